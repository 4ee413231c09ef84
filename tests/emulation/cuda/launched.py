"""What the launchers of ``csrc/cuda`` launch on small shapes: threads and shared memory of each kernel, and with
``count`` the bytes that the kernels of an op and direction move, counted by the PTX simulator.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from slimkernels.ops.inr_weights import InrTensor
from tests.emulation.cuda import depthwise, inr
from tests.emulation.cuda.simulated import Launch, Simulated
from tests.emulation.cuda.test_slice_accumulate import accumulate

NAMES = {torch.float32: ("f32", "float"), torch.bfloat16: ("bf16", "__nv_bfloat16"), torch.float16: ("f16", "__half")}
OPERANDS = ("f32", "tf32", "bf16", "f16")


@dataclass(frozen=True)
class Case:
    """The launches of one op, direction and dtype, and the fewest bytes that they could move."""

    op: str
    dtype: str
    launches: list[Launch]
    least: int


def size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def slices(execute: bool) -> Iterator[Case]:
    for target, source in [*((d, d) for d in NAMES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]:
        kernels = Simulated("slice_accumulate", execute=execute)
        full, part = torch.zeros(64, 64, dtype=target), torch.zeros(48, 64, dtype=source)
        accumulate(kernels.allow(full, part), [full], [part])
        yield Case("slice_accumulate", NAMES[target][0], kernels.launches, 2 * size(full[:48]) + size(part))


def convolutions(execute: bool) -> Iterator[Case]:
    geometry = ((1, 1), (1, 1), (1, 1))
    for dtype, (name, _) in NAMES.items():
        for channels_last, channels in [(False, 8), (True, 16), (True, 15)]:
            x = torch.zeros(2, channels, 16, 16, dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            y, weight, bias = torch.zeros_like(x), torch.zeros(channels, 1, 3, 3, dtype=dtype), x.new_zeros(channels)
            kernels = Simulated("slim_conv_depthwise", execute=execute).allow(x, weight, bias, y)
            depthwise.forward(kernels, x, weight, bias, None, y, geometry, "silu")
            yield Case("slim_conv_depthwise", name, kernels.launches, size(x, weight, bias, y))
            kernels = Simulated("slim_conv_depthwise_gradient", execute=execute)
            depthwise.weight_gradient(kernels, y, x, weight, geometry)
            yield Case("slim_conv_depthwise_gradient", name, kernels.launches, size(x, y, weight))


def weights(execute: bool) -> Iterator[Case]:
    """Forward with every hidden size; where they are executed the smallest only."""
    tensor, pair, bands = InrTensor(0, 4, (3, 3), 0), (16, 16), 4
    for operand, dtype in enumerate(OPERANDS):
        kind = inr.packing.STORAGE[operand]
        for hidden in inr.packing.HIDDEN[: 1 if execute else None]:
            inputs = 6 + 12 * bands
            parameters = [
                torch.zeros(shape, dtype=kind)
                for shape in [
                    (1, hidden, inputs), (1, hidden), (1, 2, hidden, hidden), (1, 2, hidden), (1, 2), (1, 9, hidden), (1, 9),
                ]
            ]  # fmt: skip
            active, spec, options = list(pair), list(tensor.packed()), ("silu", "neumeta", 128.0, "none", 0.5, 1, 0)
            scale, dy = torch.zeros(1, dtype=kind), torch.zeros(16 * 16 * 9, dtype=kind)
            kernels = Simulated(inr.STEMS_OF[operand], execute=execute)
            with inr.on_emulator(kernels, operand):
                inr.packing.inr_weights(*parameters, scale, [], None, active, spec, *options, kind, False)
                forward = len(kernels.launches)
                inr.packing.inr_weights_backward(
                    dy, *parameters, scale, None, dy.new_empty(0), active, spec, *options
                )  # fmt: skip
            yield Case("inr_weights", dtype, kernels.launches[:forward], size(*parameters, scale, dy))
            least = size(*parameters, scale, dy, *parameters, scale)
            yield Case("inr_weights", dtype, kernels.launches[forward:], least)


CASES = {
    "slice_accumulate": slices,
    "slim_conv_depthwise": convolutions,
    "slim_conv_depthwise_gradient": convolutions,
    "inr_weights": weights,
}


def counted_as(op: str, kernel: str) -> str:
    """Bytes of ``inr_weights`` are counted with the smallest hidden size only."""
    return kernel.split(",")[0] if op == "inr_weights" else kernel


@functools.cache
def found(op: str) -> tuple[dict[str, tuple[int, int]], dict[str, float]]:
    """Of each kernel that a small shape launches threads and shared memory; the bytes that it moves, with those that are
    launched with it, over the fewest."""
    sizes, moved = {}, {}
    for execute in (False, True):
        for case in CASES[op](execute):
            if case.op != op:
                continue
            total = sum(launch.moved for launch in case.launches)
            for launch in case.launches:
                sizes.setdefault(launch.kernel, (launch.threads, launch.shared))
                if execute:
                    moved.setdefault(counted_as(op, launch.kernel), total / case.least)
    return sizes, moved
