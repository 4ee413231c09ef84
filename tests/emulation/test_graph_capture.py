"""What a CUDA graph cannot hold: no forward or backward waits for the GPU, reads from it or copies from the host.

Modules run on the CPU, and every op that they call, forward and backward, is recorded. Then its GPU launcher runs with the
same arguments on the device ``meta`` for a GPU: nothing is computed there, but all that it asks PyTorch for is seen.
"""

import importlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slimkernels import elastic, hyper
from slimkernels import nn as slim
from slimkernels.models.resnet import CifarResNet
from slimkernels.ops import InrParameters, InrTensor, _recurrent_gpu, inr_weights, slice_accumulate_
from slimkernels.reference import inr_weights as reference
from tests.helpers import map_tensors, tensors_in
from tests.ops.test_inr_weights import networks

pytest.importorskip("triton", reason="Triton is not installed")
capture = pytest.importorskip("tests.emulation.capture", reason="needs Triton").capture

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")


class Calls(TorchDispatchMode):
    """The ops of slimkernels that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "slimkernels":
            self.found.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


class Graph(TorchDispatchMode):
    """What of the calls within it a graph could not hold."""

    def __init__(self):
        super().__init__()
        self.broken = []
        self.tables = Tables(self.broken)

    def __enter__(self):
        self.tables.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.tables.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.broken.append(name)
        out = func(*args, **(kwargs or {}))
        given = tensors_in([args, list((kwargs or {}).values())])
        places = {t.device.type for t in [*given, *tensors_in(out)] if t.dim() or name in ("_to_copy", "copy_")}
        if {"cpu", "meta"} <= places:
            self.broken.append(name)
        return out


class Tables(TorchFunctionMode):
    """``torch.tensor([...], device=...)``: on a GPU a copy from the host, of which ``meta`` makes no call."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.is_meta and not tensors_in(args):
            self.broken.append(func.__name__)
        return out


class Operators:
    """``slimkernels._cuda``: launches that a graph holds. What they are given is on the GPU, but for a seed."""

    def __init__(self):
        self.launched = []

    def __getattr__(self, name):
        def launch(*args):
            assert all(t.is_meta for t in tensors_in(args))
            self.launched.append(name)

        return launch


MODULES = ("slim_linear", "slim_conv", "slim_conv_transpose", "slim_batch_norm", "slim_group_norm", "slim_layer_norm")
MODULES += ("slim_rms_norm",)
CUDA = {"inr_weights": "inr_weights", "slice_accumulate_": "slice_accumulate"}


def launchers(name):
    """The functions that the CUDA key of an op tries, in order; for what is composed of another op that composition."""
    stem = name.removesuffix("_slice").removesuffix("_backward")
    if name.endswith("_slice"):
        return [sys.modules[f"slimkernels.ops.{stem}"]._backward_slice]
    if stem in CUDA:
        return [getattr(importlib.import_module(f"slimkernels.cuda_kernels.{CUDA[stem]}"), name)]
    found = [getattr(importlib.import_module(f"slimkernels.triton_kernels.{stem}"), name)]
    if stem == "slim_conv":
        found.insert(0, getattr(importlib.import_module("slimkernels.cuda_kernels.slim_conv_depthwise"), name))
    return found


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU, on which the CUDA C++ kernels are there too."""
    operators = Operators()
    for stem in ("inr_weights", "slice_accumulate", "slim_conv_depthwise"):
        module = importlib.import_module(f"slimkernels.cuda_kernels.{stem}")
        monkeypatch.setattr(module, "operators", lambda: operators)
        monkeypatch.setattr(module, "available", lambda: True)
    with torch.no_grad():
        yield operators


def on_gpu(value):
    return map_tensors(value, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))


def replay(name, args):
    """Runs the GPU launcher of one recorded call; what broke the graph, and the Triton kernels that were launched."""
    args = on_gpu(args)
    with Graph() as graph:

        def run():
            assert any(launcher(*args) is not NotImplemented for launcher in launchers(name))

        launched = capture(run)
    return graph.broken, [launch.name for launch in launched]


def train(module, *inputs):
    """Records forward and backward."""
    with Calls() as calls:
        outputs = [t for t in tensors_in(module(*inputs)) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    return calls.found


def at(module, *widths):
    if widths:
        module.set_width(*widths)
    return module


def image(c, *size):
    return torch.randn(2, c, *size).contiguous(memory_format=torch.channels_last)


def generated():
    generator = hyper.WeightGenerator(network())
    with pytest.MonkeyPatch.context() as patch:  # what save="auto" decides on a GPU
        patch.setattr(sys.modules["slimkernels.ops.inr_weights"], "keeps_activations", lambda *args: False)
        return train(lambda: list(generator(0.5).values()))


def accumulated():
    with Calls() as calls:
        slice_accumulate_([torch.zeros(8, 6), torch.zeros(9)], [torch.ones(4, 3), torch.ones(5)])
    return calls.found


def network():
    return elastic.convert(CifarResNet(8, (8, 16, 24)), torch.randn(2, 3, 8, 8), widths=(0.25, 1.0), divisor=2)


def resnet():
    model = network()
    elastic.set_width(model, 0.5)
    return train(model, torch.randn(2, 3, 8, 8))


PROBLEMS = {
    "linear": lambda: train(at(slim.SlimLinear(16, 12), 7), torch.randn(5, 9, requires_grad=True)),
    "conv": lambda: train(at(slim.SlimConv2d(16, 12, 3), 7), image(9, 6, 6)),
    "conv depthwise": lambda: train(at(slim.SlimConv2d(8, 8, 3, groups=8), 5), image(5, 6, 6)),
    "conv transposed": lambda: train(at(slim.SlimConvTranspose2d(16, 12, 3, stride=2), 7), image(9, 6, 6)),
    "batch norm": lambda: train(slim.SlimBatchNorm2d(16), image(9, 6, 6)),
    "batch norm, eval": lambda: train(slim.SlimBatchNorm2d(16).eval(), image(9, 6, 6)),
    "group norm": lambda: train(slim.SlimGroupNorm(4, 16), image(8, 6, 6)),
    "layer norm": lambda: train(slim.SlimLayerNorm(16), torch.randn(5, 9)),
    "rms norm": lambda: train(slim.SlimRMSNorm(16), torch.randn(5, 9)),
    "generated weights": generated,
    "slice_accumulate_": accumulated,
    "ResNet": resnet,
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_launchers_can_be_captured(name, request):
    calls = PROBLEMS[name]()
    assert calls
    operators = request.getfixturevalue("fake_gpu")  # only now: the recording runs on the CPU
    triton = []
    for op, args in calls:
        broken, launched = replay(op, args)
        assert broken == [], f"{op} in {name}"
        triton += launched
    assert triton or operators.launched
    if name == "conv depthwise":
        assert {"depthwise_forward", "depthwise_weight_gradient"} <= set(operators.launched)
    if name == "generated weights":
        assert {"inr_forward", "inr_backward"} <= set(operators.launched)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_layers_can_be_captured(kind):
    gates = 4 if kind == "lstm" else 3
    weights = [torch.empty(gates * 8, n, device="meta") for n in (6, 8)]
    weights += [torch.empty(gates * 8, device="meta") for _ in range(2)]
    states = [None, None] if kind == "lstm" else [None]
    sizes = (5, 0, 1) if kind == "lstm" else (5, 1)
    with torch.no_grad(), Graph() as graph:
        y, *_ = getattr(_recurrent_gpu, kind)(
            torch.empty(3, 2, 4, device="meta"), *states, weights, None, 1, False, *sizes
        )
    assert y.shape == (3, 2, 5)
    assert graph.broken == []


def wait(x):
    with pytest.raises(RuntimeError, match="item"):
        x.sum().item()


BREAKS = {
    "a value read back": wait,
    "a table from the host": lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
    "a copy from the host": lambda x: x.copy_(torch.ones(2)),
    "a mask": lambda x: x[x > 0],
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_a_graph_cannot_hold_is_found(name):
    x = torch.empty(2, device="meta")
    with Graph() as graph:
        try:
            BREAKS[name](x)
        except (RuntimeError, NotImplementedError):
            assert name == "a mask"  # PyTorch has no shape for it on this device, and says so
            return
    assert graph.broken


LARGEST = {"hidden": 512, "outputs": 128, "bands": 24, "activation": "relu", "save": "recompute"}
BEYOND = {"hidden": 513, "outputs": 129, "bands": 25, "activation": "sigmoid", "save": "full"}


@pytest.mark.parametrize("name", LARGEST)
def test_networks_beyond_the_kernels_compose_the_reference(name, monkeypatch):
    module = importlib.import_module("slimkernels.cuda_kernels.inr_weights")
    launched = []

    class Launches:
        def __getattr__(self, name):
            return lambda *args: launched.append(name)

    monkeypatch.setattr(module, "operators", Launches)
    monkeypatch.setattr(module, "available", lambda: True)
    monkeypatch.setattr(module, "shared_limit", lambda device: 2**30)  # the sizes above are the only limits

    def calls(value):
        chosen = dict.fromkeys(("hidden", "outputs", "bands"), 8) | {"activation": "relu", "save": "recompute"}
        chosen[name] = value
        activation, save = chosen.pop("activation"), chosen.pop("save")
        drawn = InrParameters(*(t.requires_grad_() for t in networks(depth=1, **chosen)))
        tensors = [InrTensor(0, 1, (), 0, "bias", tile=(1, chosen["outputs"]))]
        return train(lambda: inr_weights(drawn, tensors, [(5, 1)], norm=32.0, activation=activation, save=save))

    for value, kernels in ((LARGEST[name], ["inr_forward", "inr_backward"]), (BEYOND[name], [])):
        launched.clear()
        for op, args in calls(value):
            with torch.no_grad():
                found = getattr(module, op)(*args)
                if not kernels:
                    torch.testing.assert_close(found, getattr(reference, op)(*args))
        assert launched == kernels
