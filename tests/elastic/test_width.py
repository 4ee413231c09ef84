"""Setting widths: values, names, nesting, threads, torch.compile."""

import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import slimkernels
from slimkernels import elastic
from slimkernels.elastic.plan import make_divisible
from tests.elastic.nets import build
from tests.helpers import error


@pytest.fixture(scope="module")
def resnet():
    net, x = build("resnet20")
    return elastic.convert(net, x, divisor=4), x


@pytest.mark.parametrize(
    ("value", "divisor", "full", "expected"),
    [
        (16, 8, 32, 16),
        (3, 8, 32, 8),
        (20, 8, 32, 24),
        (19, 8, 100, 24),
        (9.9, 8, 64, 16),
        (18, 8, 20, 20),
        (100, 1, 129, 100),
    ],
)
def test_make_divisible(value, divisor, full, expected):
    got = make_divisible(value, divisor, full)
    assert got == expected
    assert got >= 0.9 * value


@pytest.mark.parametrize("full", [1, 3, 5, 7, 9, 13, 15, 17, 31, 33, 63, 65, 72, 96, 100, 127, 129])
@torch.no_grad()
def test_odd_widths(full):
    net = nn.Sequential(nn.Linear(6, full), nn.ReLU(), nn.Linear(full, full + 2), nn.ReLU(), nn.Linear(full + 2, 3))
    x = torch.randn(4, 6)
    model = elastic.convert(net, x, divisor=1, widths=(0.01, 1.0), sort="l2")
    assert error(model(x), net(x)) < 1e-6
    for width in (0.01, 0.3, 0.5, 0.77):
        with elastic.width(model, width):
            assert error(model(x), elastic.extract(model, width)(x)) < 1e-6


def test_wrong_widths_are_named_and_change_nothing(resnet):
    model, x = resnet
    before = model(x)
    for width, text in [
        (0.1, "expected width between 0.25 and 1, got 0.1"),
        (2.0, "expected width between 0.25 and 1, got 2"),
        ("half", "expected a width to be a number, between 0.25 and 1, got 'half'"),
        ({"conv1": 0.1}, "expected width of 'conv1' between 0.25 and 1, got 0.1"),
        (
            {"nowhere": 0.5},
            "expected the name of a width dimension or of a module .globs allowed., got 'nowhere'; there are conv1",
        ),
    ]:
        with pytest.raises(ValueError, match=text):
            elastic.set_width(model, width)
    assert torch.equal(model(x), before)


def test_listed_widths_are_the_only_ones_of_switchable_norms():
    net, x = build("resnet20")
    model = elastic.convert(net, x, widths=[0.5, 0.25], divisor=4)
    assert elastic.plan(model).norm == "switchable"
    with pytest.raises(ValueError, match=r"expected width one of 0.25, 0.5, 1, got 0.3"):
        elastic.set_width(model, 0.3)
    for width in (0.25, 0.5, 1.0):
        elastic.set_width(model, width)
    universal = elastic.convert(net, x, widths=[0.5, 0.25], divisor=4, norm="universal")
    elastic.set_width(universal, 0.3)


def test_width_restores_nests_and_survives_exceptions(resnet):
    model, x = resnet
    full = model(x)
    with elastic.width(model, 0.5) as inside:
        assert inside is model
        half = model(x)
        with elastic.width(model, {"conv1": 0.25}):
            assert model.conv1.width == 4
        assert torch.equal(model(x), half)
        with pytest.raises(RuntimeError, match="boom"), elastic.width(model, 0.25):
            raise RuntimeError("boom")
        assert torch.equal(model(x), half)
    assert torch.equal(model(x), full)


def test_names_modules_and_globs(resnet):
    model, _ = resnet

    def active(width):
        with elastic.width(model, width):
            return {name: model.get_submodule(name).width for name in elastic.plan(model).groups}

    full = active(1.0)
    stage = active({"layer3": 0.5})
    assert {name for name in full if stage[name] != full[name]} == {name for name in full if name.startswith("layer3")}
    assert active({"layer3.*.conv1": 0.5}).items() >= {("layer3.0.conv1", 16), ("layer3.1.conv1", 16)}
    both = active({"layer3.0.conv1": 0.25, "layer3": 0.5})
    assert (both["layer3.0.conv1"], both["layer3.1.conv1"]) == (8, 16)


@torch.no_grad()
def test_views_in_eight_threads(resnet):
    model, x = resnet
    widths = [0.25 + 0.1 * i for i in range(8)]
    expected = []
    for width in widths:
        with elastic.width(model, width):
            expected.append(model(x))
    views = [elastic.view(model, width) for width in widths]
    for view in views:
        assert [id(p) for p in view.parameters()] == [id(p) for p in model.parameters()]
        assert {id(b) for b in view.buffers()} == {id(b) for b in model.buffers()}
    results: list[list[torch.Tensor]] = [[] for _ in views]
    start = threading.Barrier(len(views))

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(5):
                results[i].append(views[i](x))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(views))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, right in zip(results, expected, strict=True):
        assert len(outputs) == 5
        assert all(torch.equal(output, right) for output in outputs)
    assert elastic.plan(model).current == 1.0


@torch.no_grad()
def test_view_sees_new_weights_and_has_its_own_width(resnet):
    model, x = resnet
    view = elastic.view(model, 0.5)
    elastic.set_width(view, 0.25)
    with elastic.width(model, 0.25):
        assert torch.equal(view(x), model(x))
    old = model.linear.bias.clone()
    model.linear.bias.add_(1)
    try:
        with elastic.width(model, 0.25):
            assert torch.equal(view(x), model(x))
    finally:
        model.linear.bias.copy_(old)


def test_compiled_model_has_few_graphs_for_twelve_widths():
    net, x = build("resnet20")
    model = elastic.convert(net, x, divisor=4)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = slimkernels.compile(model, backend=counter, fullgraph=True)
    widths = [1.0, 0.5, 0.25, *(0.3 + 0.07 * i for i in range(9))]
    for width in widths:
        with elastic.width(compiled, width), torch.no_grad():
            assert error(compiled(x), model(x)) < 1e-6
    assert counter.frame_count <= 3
    assert elastic.plan(compiled) is elastic.plan(model)


def test_functions_want_an_elastic_model():
    with pytest.raises(ValueError, match=r"expected a model made by elastic\.convert, got a plain Linear"):
        elastic.set_width(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"expected a model made by elastic\.convert"):
        slimkernels.compile(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected a model \(nn\.Module\), got int"):
        elastic.plan(3)
