"""Rung C2: ``inr_weights`` on CPU fibers, in three schedules, against the reference."""

import ctypes

import pytest
import torch

from slimkernels.ops.inr_weights import InrTensor
from slimkernels.reference import inr_weights as reference
from tests.emulation.cuda import inr
from tests.emulation.cuda.library import SCHEDULES, EmulationError, Kernels, skip_unless_possible
from tests.helpers import error

OPERANDS = {"f32": 0, "tf32": 1, "bf16": 2, "f16": 3}
SOURCES = {0: torch.float32, 1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
# Of the weights against float64, where the reference in float32 has less than 1e-5.
LIMITS = {0: 1e-5, 1: 2e-3, 2: 2e-2, 3: 3e-3}


def networks(count, hidden, depth, bands, outputs, dtype):
    inputs = 6 + 12 * bands
    return [
        t.to(dtype)
        for t in (
            torch.randn(count, hidden, inputs) / inputs**0.5,
            torch.randn(count, hidden) * 0.1,
            torch.randn(count, depth, hidden, hidden) * (2 / hidden) ** 0.5,
            torch.randn(count, depth, hidden) * 0.1,
            torch.full((count, depth), 0.3) + torch.randn(count, depth) * 0.05,
            torch.randn(count, outputs, hidden) / hidden**0.5,
            torch.randn(count, outputs) * 0.1,
        )
    ]


TENSORS = [
    (InrTensor(0, 4, (3, 3), 2), (7, 5)),
    (InrTensor(1, 4, (1, 3), 1, "iohw", positions=(9, 4)), (6, 3)),
    (InrTensor(2, 4, (2, 2), 1, "channels_last"), (5, 9)),
    (InrTensor(3, 4, (), 0, tile=(2, 3)), (9, 10)),
    (InrTensor(3, 4, (), 0, "bias"), (11, 1)),
]


def sample(hidden, depth, operand, outputs=9, with_base=True, tensors=TENSORS):
    dtype = SOURCES[operand]
    parameters = networks(3, hidden, depth, 4, outputs, dtype)
    active = [n for _, pair in tensors for n in pair]
    spec = [value for tensor, _ in tensors for value in tensor.packed()]
    base = [torch.randn(t.shape(o + 3, i + 2 * (i > 1))) for t, (o, i) in tensors] if with_base else []
    base = [
        b.contiguous(memory_format=torch.channels_last) if t.layout == "channels_last" else b
        for b, (t, _) in zip(base, tensors, strict=False)
    ]
    return parameters, torch.randn(len(tensors)).to(dtype), base, active, spec


def check(kernels, hidden, depth, operand, activation="relu", noise="none", samples=1, order="neumeta", **more):
    parameters, scale, base, active, spec = sample(hidden, depth, operand, **more)
    options = (activation, order, 128.0, noise, 0.5, samples, 1)
    dtype = torch.float32 if operand != 3 else torch.float16
    base = [b.to(dtype) for b in base]
    with inr.on_emulator(kernels, operand):
        arguments = (*parameters, scale, base, torch.tensor(77), active, spec, *options, dtype, False)
        ours, _ = inr.packing.inr_weights(*arguments)
    exact, _ = reference.inr_weights(
        *(p.double() for p in parameters), scale.double(), [b.double() for b in base], torch.tensor(77), active, spec,
        *options, torch.float64, False,
    )  # fmt: skip
    assert error(ours, exact) < LIMITS[operand]


SLOW = [pytest.mark.slow_emulation]
QUICK = ("f32", "bf16")  # the others store the same
RUNS = [
    pytest.param(s, o, marks=[] if o in QUICK else SLOW) for s in SCHEDULES for o in OPERANDS if s == 0 or o in QUICK
]
KINDS = [pytest.param(o, marks=[] if o in QUICK else SLOW) for o in OPERANDS]


@pytest.mark.parametrize(("schedule", "operand"), RUNS)
def test_inr_weights_forward(schedule, operand):
    skip_unless_possible()
    check(Kernels(inr.STEMS_OF[OPERANDS[operand]], schedule), 33, 2, OPERANDS[operand])


@pytest.mark.parametrize("activation", ["elu", "gelu", "silu"])
def test_inr_weights_activations(activation):
    skip_unless_possible()
    check(Kernels(inr.STEMS_OF[0]), 32, 1, 0, activation)


@pytest.mark.parametrize("noise", ["axis", "element"])
def test_inr_weights_noise_and_samples(noise):
    skip_unless_possible()
    check(Kernels(inr.STEMS_OF[0], 1), 24, 1, 0, noise=noise, samples=3, order="htty")


@pytest.mark.parametrize("hidden", [100, 256, 300])
@pytest.mark.parametrize("operand", KINDS)
def test_inr_weights_hidden_sizes(hidden, operand):
    skip_unless_possible()
    check(Kernels(inr.STEMS_OF[OPERANDS[operand]]), hidden, 1, OPERANDS[operand], tensors=TENSORS[:1])


def test_inr_weights_without_hidden_layers_and_many_outputs():
    skip_unless_possible()
    check(Kernels(inr.STEMS_OF[0]), 64, 0, 0, outputs=80, tensors=[(InrTensor(1, 3, (3, 3), 1, tile=(4, 2)), (9, 70))])


def test_inr_weights_shared_memory_is_what_the_launchers_ask_for():
    skip_unless_possible()
    kernels = Kernels(inr.STEMS_OF[0])
    for hidden in inr.packing.HIDDEN:
        for outputs, bands, operand in [(64, 0, 0), (64, 16, 1), (128, 24, 2), (64, 24, 3)]:
            if outputs <= hidden:
                sizes = [ctypes.c_int64(n) for n in (hidden, outputs, bands)]
                asked = kernels.size("sk_inr_shared", *sizes, operand)
                assert inr.packing.shared_bytes(hidden, outputs, bands, operand) == asked <= 163 * 1024


def test_inr_weights_composes_where_shared_memory_is_too_small(monkeypatch):
    """As on a GPU with 99 KiB a block, which has room for these networks in 16 bits only."""
    monkeypatch.setattr(inr.packing, "available", lambda: True)
    monkeypatch.setattr(inr.packing, "shared_limit", lambda device: 99 * 1024)
    active, spec = [7, 5], list(TENSORS[0][0].packed())
    for dtype, fits in [(torch.float32, False), (torch.bfloat16, True)]:
        w_in, *_, skip, _, _ = networks(3, 512, 1, 4, 9, dtype)
        assert inr.packing.takes(w_in, skip, 9, active, spec, [], "relu", dtype) == fits


def check_backward(
    kernels, hidden, depth, operand, activation="relu", noise="none", samples=1, order="neumeta", **more
):
    parameters, scale, _, active, spec = sample(hidden, depth, operand, **more)
    options = (activation, order, 128.0, noise, 0.5, samples, 1)
    dy = torch.randn(inr.packing.total(active, spec)).to(parameters[0].dtype)
    nothing = dy.new_empty(0)
    with inr.on_emulator(kernels, operand) as operators:
        ours = inr.packing.inr_weights_backward(
            dy, *parameters, scale, torch.tensor(77), nothing, active, spec, *options
        )
    exact = reference.inr_weights_backward(
        *(t.double() for t in (dy, *parameters, scale)), torch.tensor(77), nothing.double(), active, spec, *options
    )
    for name, a, e in zip((*inr.packing.Packed._fields, "scale"), ours, exact, strict=True):
        # A skip's gradient is one sum of terms that cancel.
        assert error(a, e) < (4 if name == "skip" else 2) * LIMITS[operand], name
    return operators.plans[0]


def smooth_for(operand):
    """ReLU in float32. In fewer bits rounding takes some of its inputs to the other side of zero: whole terms are missing,
    in PyTorch too, and an error tells nothing."""
    return "relu" if operand == "f32" else "silu"


@pytest.mark.parametrize(("schedule", "operand"), RUNS)
def test_inr_weights_backward(schedule, operand):
    skip_unless_possible()
    check_backward(Kernels(inr.STEMS_OF[OPERANDS[operand]], schedule), 33, 2, OPERANDS[operand], smooth_for(operand))


@pytest.mark.parametrize("activation", ["elu", "gelu", "silu"])
def test_inr_weights_backward_activations(activation):
    skip_unless_possible()
    check_backward(Kernels(inr.STEMS_OF[0]), 32, 1, 0, activation)


@pytest.mark.parametrize("noise", ["axis", "element"])
def test_inr_weights_backward_noise_samples_and_waves(noise, monkeypatch):
    skip_unless_possible()
    monkeypatch.setattr(inr.packing, "WORK_BYTES", 64 * 64 * 4 * 5)
    plan = check_backward(Kernels(inr.STEMS_OF[0], 1), 24, 1, 0, noise=noise, samples=3, order="htty")
    assert plan.segments == 3
    assert plan.wave_tiles < 15


def check_segments(kernels):
    """A network with more coordinates than a segment holds, in waves that part its rows and columns."""
    tensors = [(InrTensor(1, 4, (), 2), (29, 75)), (InrTensor(1, 4, (1, 3), 1), (5, 3)), (InrTensor(0, 4), (90, 2))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inr.packing, "WORK_BYTES", 2 * 1024 * 64 * 4 * 4)
        return check_backward(kernels, 16, 1, 0, noise="axis", tensors=tensors)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inr_weights_backward_sums_segments_over_waves(schedule):
    skip_unless_possible()
    plan = check_segments(Kernels(inr.STEMS_OF[0], schedule))
    assert plan.segments == 5
    assert 16 < plan.wave_tiles < 38


def test_inr_weights_backward_without_hidden_layers_and_many_outputs():
    skip_unless_possible()
    tensors = [(InrTensor(1, 3, (3, 3), 1, tile=(4, 2)), (9, 70))]
    check_backward(Kernels(inr.STEMS_OF[0]), 64, 0, 0, outputs=80, tensors=tensors)


@pytest.mark.parametrize("hidden", [100, 256, 300, 512])
@pytest.mark.parametrize("operand", KINDS)
def test_inr_weights_backward_hidden_sizes(hidden, operand):
    skip_unless_possible()
    check_backward(
        Kernels(inr.STEMS_OF[OPERANDS[operand]]), hidden, 1, OPERANDS[operand], smooth_for(operand), tensors=TENSORS[:1]
    )


ENCODE = "__syncthreads();\n    for (int i = threadIdx.x; i < kStep * used"
# file, what stands there, what stands there with the bug
BUGS = {
    "barrier after the stages are read": ("inr_weights.cuh", "at);\n  }\n  __syncthreads();", "at);\n  }"),
    "barrier before a segment's stage is read": ("inr_weights_gradient.cuh", "2>();\n    __syncthreads();", "2>();"),
    "barrier before the stage is read": ("inr_weights.cuh", "2>();\n    __syncthreads();", "2>();"),
    "copies awaited": ("inr_weights.cuh", "cp_wait<Shape::kStages - 2>", "cp_wait<Shape::kStages - 1>"),
    "row of the result": ("inr_weights.cuh", "group + (e >> 1) * 8;", "group + (e >> 1) * 4;"),
    "barrier before the results": ("inr_weights_forward.cuh", "  __syncthreads();\n  const int emitted", "  const int emitted"),
    "barrier before the gradient runs back": ("inr_weights_backward.cuh", "32] = x;\n  __syncthreads();", "32] = x;"),
    "layer of the kept operands": ("inr_weights_backward.cuh", "inputs + layer * rows * kHidden, h", "inputs, h"),
    "copies awaited by a segment": ("inr_weights_gradient.cuh", "cp_wait<Shape::kStages - 2>", "cp_wait<Shape::kStages - 1>"),
    "groups of a bias": ("inr_weights_gradient.cuh", "int g = 1; g < kGroups", "int g = 1; g < kGroups - 1"),
    "segments of a network": ("inr_weights_sums.cu", "== mlp) return;  // the", "== mlp + 1) return;  // the"),
    "rows that an earlier wave began": ("inr_weights_sums.cu", "own >= begin ? make_float4", "true ? make_float4"),
    "barrier before the encodings": ("inr_weights_sums.cu", ENCODE, ENCODE[16:]),
    "axes of a table's row": ("inr_weights_sums.cu", "(index < rows) == (axis == 2)", "(index < rows) == (axis == 1)"),
    "edge of a tiled tensor": ("inr_coordinates.cuh", "return out < job.c_out && in", "return out <= job.c_out && in"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow_emulation] * (i > 1)) for i, n in enumerate(BUGS)]
)
def test_inr_weights_planted_bugs_are_found(name):
    skip_unless_possible()

    def broken():
        for schedule in SCHEDULES:
            check(Kernels(inr.STEMS_OF[0], schedule, BUGS[name]), 64, 2, 0)
            check_backward(Kernels(inr.STEMS_OF[0], schedule, BUGS[name]), 64, 2, 0)
            check_segments(Kernels(inr.STEMS_OF[0], schedule, BUGS[name]))

    with pytest.raises((AssertionError, EmulationError)):
        broken()
