"""Streaming: one step of one sequence a call runs on packed weights, which follow every change of the weights."""

import gc
import os
import threading

import pytest
import torch
from torch import nn

from slimkernels.nn import SlimGRU
from slimkernels.ops import slim_gru
from tests.helpers import ODD_SIZES, error
from tests.ops.test_slim_gru import make_weights, oracle


def streamed(weights, x, h, **kwargs):
    """All steps of x (steps, 1, i) one by one, and the last state."""
    parts, state = [], None
    for step in x.split(1):
        y, state = slim_gru(step, weights, h, state, **kwargs)
        parts.append(y)
    return torch.cat(parts), state


@pytest.mark.parametrize("h", ODD_SIZES)
@pytest.mark.parametrize(("layers", "bias"), [(1, True), (2, False), (3, True)])
@torch.no_grad()
def test_streaming_is_as_good_as_pytorch(h, layers, bias):
    i = ODD_SIZES[-1 - ODD_SIZES.index(h)]
    weights = make_weights(h + 5, i + 4, layers=layers, bias=bias)
    x = torch.randn(4, 1, i)
    exact = oracle(x.double(), [w.double() for w in weights], h, num_layers=layers)
    theirs = oracle(x, weights, h, num_layers=layers)
    for found in (streamed(weights, x, h, num_layers=layers), streamed(weights, x, h, num_layers=layers)):
        a, b, e = (torch.cat([t.flatten() for t in both]) for both in (found, theirs, exact))
        assert error(a, e) <= 2 * error(b, e) + 1e-6


@torch.no_grad()
def test_blocks_of_the_input_and_initial_states():
    weights, x, h0 = make_weights(16, 12, layers=2), torch.randn(1, 1, 10), torch.randn(2, 1, 13)
    expected = oracle(x.double(), [w.double() for w in weights], 13, h0.double(), num_layers=2, in_blocks=2)
    for _ in range(2):
        given = x.clone(), h0.clone()
        found = slim_gru(x, weights, 13, h0, num_layers=2, in_blocks=2)
        assert torch.equal(x, given[0])
        assert torch.equal(h0, given[1])
        for a, e in zip(found, expected, strict=True):
            assert error(a, e) < 1e-6
    # A row whose elements are apart, and rows of a state that is a part of a larger one.
    wide, more = torch.randn(1, 1, 20)[..., ::2], torch.randn(2, 3, 13)[:, 1:2]
    expected = oracle(wide.double(), [w.double() for w in weights], 13, more.double(), num_layers=2)
    for a, e in zip(slim_gru(wide, weights, 13, more, num_layers=2), expected, strict=True):
        assert error(a, e) < 1e-6


@torch.no_grad()
def test_every_call_gives_the_same_bits():
    weights, x = make_weights(40, 30), torch.randn(1, 1, 30)
    first = slim_gru(x, weights, 33)
    for _ in range(3):
        for a, b in zip(slim_gru(x, weights, 33), first, strict=True):
            assert torch.equal(a, b)


CHANGES = {
    "in place": lambda w: w.mul_(0.5),
    "one element": lambda w: w[w.shape[0] // 2].add_(1.0),
    "data": lambda w: w.data.mul_(0.5),
    "other storage": lambda w: setattr(w, "data", w.data * 0.5),
    "copied": lambda w: w.copy_(torch.randn_like(w)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", range(8))
@torch.no_grad()
def test_changed_weights_are_packed_again(change, which):
    weights, x = make_weights(24, 20, layers=2), torch.randn(3, 1, 20)
    streamed(weights, x, 17, num_layers=2)
    CHANGES[change](weights[which])
    exact = oracle(x.double(), [w.double() for w in weights], 17, num_layers=2)
    for a, e in zip(streamed(weights, x, 17, num_layers=2), exact, strict=True):
        assert error(a, e) < 1e-6


@torch.no_grad()
def test_other_weights_at_the_same_address():
    x = torch.randn(1, 1, 20)
    for _ in range(20):
        weights = make_weights(24, 20)
        expected = oracle(x.double(), [w.double() for w in weights], 17)
        assert error(slim_gru(x, weights, 17)[0], expected[0]) < 1e-6
        del weights
        gc.collect()


def test_training_between_two_steps_and_inference_mode():
    torch.manual_seed(0)
    net = SlimGRU(12, 20, 2)
    net.set_width(13)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(1, 1, 12)
    for _ in range(3):
        trained = net(x)[0]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert error(net(x)[0], trained) < 1e-6
        trained.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        inside = SlimGRU(12, 20)  # its parameters have no version
        whole = inside(torch.cat([x, x]))[0]
        assert error(inside(x)[0], whole[:1]) < 1e-6


@torch.no_grad()
def test_a_plain_layer_of_that_width_gives_the_same_and_many_widths_are_kept_apart():
    net = SlimGRU(40, 48, 2)
    x = torch.randn(1, 1, 40)
    for _ in range(2):
        for width in (1, 5, 16, 33, 47, 48):
            net.set_width(width)
            plain = nn.GRU(40, width, 2)
            for name, p in plain.named_parameters():
                columns = p.shape[1:] and (slice(None), slice(0, p.shape[1]))
                full = getattr(net, name).unflatten(0, (3, -1))[:, :width].flatten(0, 1)
                p.copy_(full[columns] if columns else full)
            assert error(net(x)[0], plain(x)[0]) < 1e-6


@torch.no_grad()
def test_threads_share_the_packed_weights():
    weights = make_weights(48, 40, layers=2)
    x = torch.randn(1, 1, 40)
    expected = {h: slim_gru(x, weights, h, num_layers=2)[0] for h in (17, 33)}
    wrong = []

    def work(h):
        for _ in range(200):
            if not torch.equal(slim_gru(x, weights, h, num_layers=2)[0], expected[h]):
                wrong.append(h)

    threads = [threading.Thread(target=work, args=(h,)) for h in (17, 33, 17, 33)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif("SLIMKERNELS_DISABLE" in os.environ, reason="the reference checks in its own words")
def test_shapes_are_checked_in_the_op():
    weights, run = make_weights(16, 12), torch.ops.slimkernels.slim_gru_inference
    x = torch.randn(1, 1, 12)
    run(x, None, weights, None, 1, False, 16, 1)
    for arguments, words in (
        ((torch.randn(1, 1, 13), None, weights, None, 1, False, 16, 1), "x.shape"),
        ((x, torch.randn(1, 1, 15), weights, None, 1, False, 16, 1), "h0"),
        ((x, None, weights, None, 1, False, 17, 1), "hidden_size"),
        ((x, None, weights[:-1], None, 1, False, 16, 1), "proj_size"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            run(*arguments)
