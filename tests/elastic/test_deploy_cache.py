"""Packed weights of a deployed network: in step with the model, bounded, and used by several threads."""

import threading

import pytest
import torch

from slimkernels import elastic
from tests.elastic.nets import build
from tests.elastic.test_deploy import WIDTHS, check_like_extracted, elastic_net
from tests.helpers import error


@pytest.mark.parametrize("mode", ["shared", "switchable", "universal"])
@torch.no_grad()
def test_batch_norm_modes(mode):
    net, x = build("resnet20")
    model = elastic.convert(net, x, divisor=4, norm=mode, widths=[0.25, 0.5, 1.0])
    elastic.calibrate(model, [x, x + 1], widths=[1.0] if mode == "shared" else [0.25, 0.5])
    deployed = elastic.deploy(model)
    for width in (0.25, 0.5, 1.0):
        check_like_extracted(deployed, model, x, width)
    if mode == "universal":
        elastic.calibrate(model, [x * 2], widths=[0.25, 0.5])
        check_like_extracted(deployed, model, x, 0.25)


@torch.no_grad()
def test_weights_are_packed_anew_when_the_model_was_written_to():
    model, x = elastic_net("mobilenet_v2")
    deployed = elastic.deploy(model)
    before = deployed(x)
    for change in (
        lambda: next(model.parameters()).mul_(1.5),
        lambda: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
        lambda: next(b for b in model.buffers() if b.is_floating_point()).add_(0.5),
    ):
        change()
        after = deployed(x)
        assert not torch.equal(after, before)
        before = check_like_extracted(deployed, model, x, 1.0)
        assert deployed.cached == [(1.0, None)]


@torch.no_grad()
def test_cache_is_bounded_and_stated():
    model, x = elastic_net("resnet20")
    one = elastic.deploy(model, widths=[1.0]).cache_bytes
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert 0.9 * parameters < elastic.deploy(model, widths=[1.0], winograd=False).cache_bytes < 1.6 * parameters
    assert one < 5.2 * parameters  # 3x3 layers have a second set of 36 weights for 9
    half = elastic.deploy(model, widths=[0.5]).cache_bytes
    deployed = elastic.deploy(model, widths=[1.0, 0.5], max_cache_bytes=one + half)
    assert deployed.width == 1.0
    assert deployed.cache_bytes == one + half
    deployed.set_width(0.7)
    assert deployed.cache_bytes <= deployed.max_cache_bytes
    assert (0.7, None) in deployed.cached
    for width in WIDTHS:
        check_like_extracted(deployed, model, x, width)
        assert deployed.cache_bytes <= deployed.max_cache_bytes
    report = deployed.report
    assert report.cache_bytes == deployed.cache_bytes
    assert f"{deployed.cache_bytes:,} bytes of at most {one + half:,}" in " ".join(str(report).split())


@torch.no_grad()
def test_switching_between_packed_widths_allocates_nothing():
    model, _ = elastic_net("resnet50")
    deployed = elastic.deploy(model, widths=[1.0, 0.5])
    entries = list(deployed._entries.values())
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(5):
            deployed.set_width(0.5)
            deployed.set_width(1.0)
    allocated = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert not allocated
    assert {id(e) for e in deployed._entries.values()} == {id(e) for e in entries}


@torch.no_grad()
def test_threads():
    model, x = elastic_net("googlenet")
    deployed = elastic.deploy(model, widths=[0.5])
    expected = deployed(x)
    torch.set_num_threads(2)
    try:
        assert error(deployed(x), expected) < 1e-6  # parts of a step on two threads
    finally:
        torch.set_num_threads(1)
    results: dict[int, torch.Tensor] = {}

    def call(i: int) -> None:
        for _ in range(5):
            results[i] = deployed(x)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(error(results[i], expected) < 1e-6 for i in range(4))  # calls at the same time
