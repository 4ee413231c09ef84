"""A sandwich step as it runs on a GPU: which kernels add the gradients up, and what memory they are given."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slimkernels import elastic
from slimkernels.cuda_kernels import slice_accumulate as launcher
from slimkernels.models.resnet import CifarResNet
from slimkernels.ops import _slots
from slimkernels.train.step import accumulate_passes
from tests.emulation.launchers import registered
from tests.helpers import tensors_in

WIDTHS = [1.0, 0.75, 0.5, 0.25]


class Operators:
    """``slimkernels._cuda``'s operator, in PyTorch: what it is given, checked as the binding does."""

    def __init__(self):
        self.launches = []

    def slice_accumulate(self, targets, sources):
        assert len({t.data_ptr() for t in targets}) == len(targets), "a buffer twice in a launch"
        for target, source in zip(targets, sources, strict=True):
            assert source.is_contiguous()
            assert target.dtype in (source.dtype, torch.float32)
            target[tuple(slice(0, n) for n in source.shape)] += source
        self.launches.append(len(targets))


@pytest.fixture
def operators(monkeypatch):
    found = Operators()
    monkeypatch.setattr(launcher, "operators", lambda: found)
    monkeypatch.setattr(launcher, "available", lambda: True)
    monkeypatch.setattr(_slots, "make_slot", _slots.Slot)  # those of a GPU
    with registered({"slice_accumulate_": launcher.slice_accumulate_}):
        yield found


def problem(channels_last):
    torch.manual_seed(0)
    model = elastic.convert(CifarResNet(8, (8, 16, 24)), torch.randn(2, 3, 8, 8), widths=(0.25, 1.0), divisor=2)
    x = torch.randn(4, 3, 8, 8)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, (x, torch.arange(4) % 10)


class Allocations(TorchDispatchMode):
    """Of each shape how many tensors calls returned that share no memory with what they were given."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_in([args, list((kwargs or {}).values())])}
        self.made.update(tuple(t.shape) for t in tensors_in(out) if t.untyped_storage().data_ptr() not in given)
        return out


@pytest.mark.parametrize("waits", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_a_step_adds_gradients_with_the_cuda_kernel(operators, monkeypatch, channels_last, amp, waits):
    expected_model, batch = problem(channels_last)
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "available", lambda: False)  # tests/train compares this with autograd's own sums
        accumulate_passes(expected_model, batch, F.cross_entropy, WIDTHS, amp=amp)
    assert operators.launches == []
    monkeypatch.setattr(_slots.Waiting, "takes", staticmethod(lambda part: waits))
    model, batch = problem(channels_last)
    with Allocations() as allocations:
        accumulate_passes(model, batch, F.cross_entropy, WIDTHS, amp=amp)
    for (name, p), q in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    slotted = [m for m in model.modules() if hasattr(m, "kernel_size") or hasattr(m, "running_mean")]
    reached = [p for m in slotted for p in m.parameters(recurse=False) if p.grad is not None]
    count = len(reached)
    # Three passes add to what the first left; where that has other strides than the parameter it is added too.
    assert 3 * count <= sum(operators.launches) <= 4 * count
    if waits:  # but for the last pass, which hands every sum to autograd at once
        assert max(operators.launches) > count / 3
        assert len(operators.launches) <= 2 * count + 4
    alone, batch = problem(channels_last)
    with Allocations() as one_pass:
        accumulate_passes(alone, batch, F.cross_entropy, WIDTHS[:1], amp=amp)
    for shape in {tuple(p.shape) for p in reached if p.dim() == 4}:
        buffers = sum(p.shape == shape for p in reached)
        more = allocations.made[shape] - one_pass.made[shape]
        assert more <= buffers, "narrower passes make tensors of a gradient's full size"
