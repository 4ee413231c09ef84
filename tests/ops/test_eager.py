"""The short way of usual calls gives what the long way gives, and leaves to it all that is not usual."""

import importlib
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from slimkernels import hyper, nn
from slimkernels._extension import cpp_available
from slimkernels.ops._eager import eager
from slimkernels.ops._recipes import recomputed_outputs
from slimkernels.ops._slots import gradient_slots

needs_extension = pytest.mark.skipif(not cpp_available(), reason="the short way is in the extension")


def leaf(*shape, dtype=torch.float32, needs=True):
    return torch.randn(*shape).to(dtype).requires_grad_(needs)


# The op, its tensors by name and its other arguments.
CALLS = {
    "slim_conv": (
        lambda: {"x": leaf(2, 6, 7, 8), "weight": leaf(9, 8, 3, 3), "bias": leaf(9), "residual": leaf(2, 5, 7, 8)},
        {"out_channels": 5, "padding": 1, "activation": "relu"},
    ),
    "slim_conv_transpose": (
        lambda: {"x": leaf(2, 6, 5, 4), "weight": leaf(8, 9, 2, 2), "bias": leaf(9), "residual": leaf(2, 5, 10, 8)},
        {"out_channels": 5, "stride": (2, 2), "activation": "relu"},
    ),
    "slim_linear": (
        lambda: {"x": leaf(7, 12), "weight": leaf(9, 16), "bias": leaf(9), "residual": leaf(7, 6)},
        {"out_features": 6, "in_blocks": 2, "out_blocks": 3, "activation": "tanh"},
    ),
    "slim_layer_norm": (
        lambda: {"x": leaf(3, 5, 12), "weight": leaf(16), "bias": leaf(16), "residual": leaf(3, 5, 12)},
        {"activation": "silu"},
    ),
    "slim_rms_norm": (lambda: {"x": leaf(3, 5, 12), "weight": leaf(16), "residual": leaf(3, 5, 12)}, {}),
    "slim_group_norm": (
        lambda: {"x": leaf(3, 6, 5), "weight": leaf(8), "bias": leaf(8), "residual": leaf(3, 6, 5)},
        {"group_size": 2, "activation": "relu"},
    ),
    "slim_batch_norm": (
        lambda: {
            "x": leaf(3, 6, 5),
            "running_mean": leaf(8, needs=False),
            "running_var": torch.rand(8) + 0.5,
            "weight": leaf(8),
            "bias": leaf(8),
            "residual": leaf(3, 6, 5),
        },
        {"training": True, "activation": "relu"},
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    module = importlib.import_module(f"slimkernels.ops.{request.param}")
    make, others = CALLS[request.param]
    return module, getattr(module, request.param), make(), others


def gradients(function, tensors, others):
    """The output and the gradients of all that need one."""
    y = function(**tensors, **others)
    wanted = [t for t in tensors.values() if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y).cumsum(-1))]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_eager_equals_the_long_way(call, dtype, monkeypatch):
    module, function, tensors, others = call
    tensors = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in tensors.items()}
    for name in ("running_mean", "running_var"):
        if name in tensors:
            tensors[name] = tensors[name].float()
    running = {name: t.clone() for name, t in tensors.items() if name.startswith("running")}
    short = gradients(function, tensors, others)
    assert "Eager" in short[0].grad_fn.name()
    monkeypatch.setattr(module, "_eager", lambda *args: None)
    long = gradients(function, tensors | running, others)
    assert "Eager" not in long[0].grad_fn.name()
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype
    for name, t in running.items():
        torch.testing.assert_close(tensors[name], t)


@needs_extension
def test_eager_without_optional_tensors_and_gradients(call, monkeypatch):
    module, function, tensors, others = call
    fewer = {name: None if name in ("bias", "residual") else t for name, t in tensors.items()}
    fewer["weight"] = fewer["weight"].detach()
    short = gradients(function, fewer, others)
    with torch.no_grad():
        plain = function(**fewer, **others)
        assert plain.grad_fn is None
        assert torch.equal(plain, short[0])
    with torch.inference_mode():
        if "running_mean" not in fewer:  # which inference mode may not change outside
            assert torch.equal(function(**fewer, **others), plain)
    monkeypatch.setattr(module, "_eager", lambda *args: None)
    for a, b in zip(short, gradients(function, fewer, others), strict=True):
        assert torch.equal(a, b)


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@needs_extension
def test_eager_leaves_what_is_not_usual(call):
    module, function, tensors, others = call
    arguments = tensors | others
    with Seen() as seen:
        function(**arguments)
    assert any(module.__name__.rpartition(".")[2] in name for name in seen.names)
    assert type(function(**arguments | {"x": tensors["x"].detach().as_subclass(Subclass)})) is Subclass
    with torch.autocast("cpu", torch.bfloat16):
        assert "Eager" not in str(function(**arguments).grad_fn.name())
    doubles = {name: t.detach().double().requires_grad_() for name, t in tensors.items() if "running" not in name}
    doubles |= {name: t.double() for name, t in tensors.items() if "running" in name}
    assert function(**doubles, **others).dtype == torch.float64
    with gradient_slots([tensors["weight"]]):
        assert "Eager" not in function(**arguments).grad_fn.name()
    with recomputed_outputs():
        assert "Eager" not in function(**arguments).grad_fn.name()


@needs_extension
def test_eager_refuses_a_second_backward_like_the_long_way(call):
    _, function, tensors, others = call
    y = function(**tensors, **others)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@needs_extension
def test_eager_sees_tensors_changed_in_place(call):
    _, function, tensors, others = call
    x = tensors["x"] * 1
    y = function(**tensors | {"x": x}, **others)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_extension
def test_eager_takes_no_argument_of_another_kind():
    run = eager("slim_conv")
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 1, 1)
    usual = (x, weight, None, 4, 1, 0, 1, 1, "none", None)
    assert run(*usual).shape == (1, 4, 3, 3)
    for place, value in [
        (0, None),
        (1, 3),
        (3, 5),
        (3, True),
        (3, 2**70),
        (4, "same"),
        (4, (1, 1, 1)),
        (4, 0),
        (8, "no"),
        (9, x),
    ]:
        assert run(*usual[:place], value, *usual[place + 1 :]) is None
    assert run(*usual[:5]) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # make_dual's own
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("op", [*CALLS, "SlimLSTM", "SlimGRU"])
def test_forward_mode_is_refused(op, needs):
    if op in CALLS:
        make, options = CALLS[op]
        tensors = {name: t.detach().requires_grad_(needs and t.requires_grad) for name, t in make().items()}
        function = getattr(importlib.import_module(f"slimkernels.ops.{op}"), op)
        x = tensors.pop("x")
        run = partial(function, **tensors, **options)
    else:
        run, x = getattr(nn, op)(4, 4).requires_grad_(needs), torch.randn(3, 2, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="expected inputs without tangents"):
            run(dual)
    run(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # make_dual's own
def test_weight_generation_refuses_forward_mode():
    generator = hyper.WeightGenerator(
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), example_inputs=torch.randn(2, 4)
    )
    name, parameter = next(iter(generator.networks.named_parameters()))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(parameter.detach(), torch.ones_like(parameter))
        with pytest.raises(NotImplementedError, match="inr_weights: expected inputs without tangents"):
            torch.func.functional_call(generator, {f"networks.{name}": dual}, (1.0,))
