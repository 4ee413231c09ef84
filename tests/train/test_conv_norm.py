"""The node of convolution, batch norm, residual and activation against the two ops one after another."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimkernels import _extension
from slimkernels.nn import SlimBatchNorm1d, SlimBatchNorm2d, SlimConv1d, SlimConv2d
from slimkernels.ops._recipes import recomputed_outputs
from slimkernels.ops._slots import flush, gradient_slots
from slimkernels.train import fuse
from slimkernels.train.conv_norm import conv_norm
from tests.helpers import error

pytestmark = pytest.mark.skipif(_extension._C is None, reason="the node is the C++ extension's")

FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
SHAPES = {  # inputs, outputs, active inputs, active outputs, size, convolution
    "k3": (8, 8, 5, 7, 9, {"kernel_size": 3, "padding": 1}),
    "k3-wide": (40, 33, 40, 33, 7, {"kernel_size": 3, "padding": 1}),
    "k3-stride2": (8, 16, 6, 12, 10, {"kernel_size": 3, "padding": 1, "stride": 2}),
    "k1": (16, 24, 9, 17, 6, {"kernel_size": 1}),
    "depthwise": (12, 12, 8, 8, 8, {"kernel_size": 3, "padding": 1, "groups": 12}),
    "dilated": (6, 6, 6, 6, 9, {"kernel_size": 3, "padding": 2, "dilation": 2}),
}


class Case:
    def __init__(self, shape, dtype, channels_last=True, activation="relu", residual=False):
        torch.manual_seed(0)
        n_in, n_out, c, n, size, options = SHAPES[shape]
        self.conv, self.norm = SlimConv2d(n_in, n_out, bias=False, **options), SlimBatchNorm2d(n_out)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)
        self.norm.running_mean.uniform_(-1, 1)
        self.conv.set_width(n)
        self.norm.set_width(n)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.x = torch.randn(4, c, size, size).to(dtype).contiguous(memory_format=layout)
        with torch.no_grad():
            y = self.conv.to(dtype)(self.x)
            self.conv.float()
        self.residual = torch.randn_like(y) if residual else None
        self.dy, self.dtype, self.activation = torch.randn_like(y), dtype, activation

    def double(self):
        made = copy.deepcopy(self)
        made.conv.double()
        made.norm.double()
        made.x, made.dy, made.dtype = self.x.double(), self.dy.double(), torch.float64
        made.residual = None if self.residual is None else self.residual.double()
        return made

    def run(self, fused, passes=1):
        """Output, gradients and running statistics."""
        x = self.x.clone(memory_format=torch.preserve_format).requires_grad_()
        residual = None if self.residual is None else self.residual.clone().requires_grad_()
        parameters = [*self.conv.parameters(), *self.norm.parameters()]
        amp = torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with gradient_slots(parameters) as slots:
            for i in range(passes):
                for slot in slots if i == passes - 1 else ():
                    slot.last = True
                with amp:
                    if fused:
                        y = conv_norm(self.conv, self.norm, x, residual, self.activation)
                        assert y is not None
                        assert "ConvNorm" in y.grad_fn.name()
                    else:
                        y = fuse.run_norm(self.norm, self.conv(x), residual, self.activation)
                y.backward(self.dy)
            flush(slots)
        grads = [t.grad for t in (x, residual, *parameters) if t is not None]
        assert all(g is not None for g in grads)
        return [y.detach(), *grads, self.norm.running_mean, self.norm.running_var]


@pytest.mark.parametrize("dtype", FLOORS, ids=["f32", "bf16"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_node_is_as_good_as_the_ops(shape, residual, dtype):
    for activation in ("none", "relu", "relu6", "silu") if shape == "k3" else ("relu",):
        case = Case(shape, dtype, activation=activation, residual=residual)
        exact = case.double().run(fused=False)
        plain = copy.deepcopy(case).run(fused=False)
        ours = case.run(fused=True)
        assert case.norm.num_batches_tracked == 1
        for i, (a, b, e) in enumerate(zip(ours, plain, exact, strict=True)):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.stride() == b.stride(), i
            assert error(a, e) <= 2 * error(b, e) + FLOORS[dtype], (activation, i)


@pytest.mark.parametrize("channels_last", [True, False])
def test_several_passes_add_up(channels_last):
    case = Case("k3", torch.float32, channels_last=channels_last)
    expected = copy.deepcopy(case).run(fused=False, passes=3)
    for a, b in zip(case.run(fused=True, passes=3), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_outside_of_slots_gradients_have_the_full_size():
    case = Case("k3", torch.float32)
    case.x.requires_grad_()
    for p in (case.norm.weight, case.norm.bias):
        p.requires_grad_(False)
    with gradient_slots([]):
        assert conv_norm(case.conv, case.norm, case.x, None, "relu") is None  # the weight has no slot


def test_what_is_not_a_node_runs_one_after_another():
    def runs(change, x=None, residual=None):
        case = Case("k3", torch.float32)
        change(case)
        with gradient_slots([*case.conv.parameters(), *case.norm.parameters()]):
            return conv_norm(case.conv, case.norm, case.x if x is None else x, residual, "relu") is not None

    assert runs(lambda case: None)
    assert not runs(lambda case: case.norm.eval())
    assert not runs(lambda case: setattr(case.norm, "momentum", None))
    assert not runs(lambda case: setattr(case.conv, "bias", nn.Parameter(torch.zeros(8))))
    assert not runs(lambda case: setattr(case.conv, "activation", "relu"))
    assert not runs(lambda case: case.conv.double())
    assert not runs(lambda case: None, residual=torch.zeros(1, 7, 1, 1))
    assert not runs(lambda case: None, residual=2.0)
    assert not runs(lambda case: case.norm.start_calibration([1.0]))


def test_one_dimension_and_norms_without_parameters():
    torch.manual_seed(0)
    conv = SlimConv1d(4, 6, 3, bias=False)
    norm = SlimBatchNorm1d(6, affine=False, track_running_stats=False)
    x = torch.randn(3, 4, 12)
    with gradient_slots(conv.parameters()) as slots:
        slots[0].last = True
        y = conv_norm(conv, norm, x, None, "none")
        y.square().sum().mul(0.5).backward(retain_graph=True)
    expected = norm(F.conv1d(x, conv.weight))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert conv.weight.grad is not None


def test_recomputed_outputs_give_the_same_bits_in_the_node():
    """A chain of nodes with sums: outputs that are computed again once, through two norms, and kept."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layers = [(SlimConv2d(6, 6, 3, padding=1, bias=False), SlimBatchNorm2d(6)) for _ in range(7)]
        x = torch.randn(3, 6, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
        parameters = [p for pair in layers for module in pair for p in module.parameters()]
        with gradient_slots(parameters) as slots, recomputed_outputs() if recompute else nullcontext():
            for slot in slots:
                slot.last = True
            y = conv_norm(*layers[0], x, None, "relu")
            for i in (1, 3, 5):
                between = conv_norm(*layers[i], y, None, "silu")
                y = conv_norm(*layers[i + 1], between, y, "relu" if i != 3 else "none")
            y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
