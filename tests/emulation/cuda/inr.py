"""The operators of ``inr_weights`` on the emulator: the op's own Python packs and calls, only the library is another."""

import ctypes
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from slimkernels.cuda_kernels import inr_weights as packing
from tests.emulation.cuda.library import DTYPES, Kernels, guarded, pointer

OPERANDS = ("float", "tf32", "bfloat16", "half")
STEMS = (
    "inr_weights",
    "inr_weights_sums",
    *(f"inr_weights_{o}" for o in OPERANDS),
    *(f"inr_weights_{o}_backward" for o in OPERANDS),
)
COLUMNS = 20  # integers a job
STEMS_OF = [("inr_weights", "inr_weights_sums", f"inr_weights_{o}", f"inr_weights_{o}_backward") for o in OPERANDS]
POINTERS = ("w_in", "b_in", "w_hidden", "b_hidden", "skip", "w_out", "b_out", "scale", "jobs", "seed", "tables")
INTEGERS = (
    "seed_value", "job_count", "tiles", "table_rows", "mlps", "hidden", "depth", "outputs", "real_outputs", "bands",
    "samples", "first_sample", "noise", "neumeta", "activation",
)  # fmt: skip
WORK = (
    "dy", "w_hidden", "w_out", "runs", "inputs", "gradients", "results", "first", "dskip", "dscale", "dtables", "partial",
    "total", "first_total", "scale_total",
)  # fmt: skip


class Call(ctypes.Structure):
    """``SkInr``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("norm", ctypes.c_float),
        ("limit", ctypes.c_float),
    ]


class Plan(ctypes.Structure):
    """``SkInrPlan``."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "tile_rows", "runs", "segments", "wave_tiles", "table_segments", "numbers", "first_numbers", "partial",
        )
    ]  # fmt: skip


class Work(ctypes.Structure):
    """``SkInrBackward``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in WORK),
        *((name, ctypes.c_int64) for name in ("tensors", *(f"of_the_wave_{k}" for k in range(8)))),
    ]


class Operators:
    """What csrc/cuda/binding_inr.cpp offers, with the emulator's launchers behind it."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.plans: list[Plan] = []  # of backward

    def call(self, networks, scale, seed, jobs, numbers, norm, limit, per_sample) -> tuple[Call, list[Tensor]]:
        _, activation, neumeta, noise, samples, first_sample, real_outputs = numbers
        table = torch.tensor(jobs).view(-1, COLUMNS)
        rows = samples * (-(-table[:, 8] // table[:, 5]) - (-table[:, 9] // table[:, 6]))
        hidden = networks[0].shape[-1]
        tables = torch.full((0 if noise == 2 else int(rows.sum()), hidden), float("nan"))
        uploaded = torch.zeros_like(table)
        self.kernels.allow(uploaded)
        self.kernels.launch("sk_upload", pointer(uploaded), pointer(table), ctypes.c_int64(table.numel() * 8))
        assert torch.equal(uploaded, table) or not self.kernels.execute
        assert self.kernels.size("sk_inr_tile", ctypes.c_int64(hidden)) == packing.tile_rows(hidden)
        call = Call(
            *(pointer(t) for t in networks), pointer(scale), pointer(uploaded), None, pointer(tables),
            0 if seed is None else int(seed), len(table), int(table[:, 14].sum()) * (samples if per_sample else 1),
            len(tables), networks[0].shape[0], hidden, networks[4].shape[1], networks[6].shape[1], real_outputs,
            (networks[0].shape[2] - 1) // 2, samples, first_sample, noise, neumeta, activation, norm, limit,
        )  # fmt: skip
        return call, [uploaded, tables]

    def inr_forward(self, networks, scale, base, seed, jobs, numbers, norm, limit, weights) -> None:
        call, alive = self.call(networks, scale, seed, jobs, numbers, norm, limit, False)
        weights.fill_(float("nan"))
        self.kernels.allow(*networks, scale, *base, weights, *alive)
        self.kernels.launch("sk_inr_forward", ctypes.byref(call), pointer(weights), numbers[0], DTYPES[weights.dtype])
        del alive

    def inr_backward(self, networks, transposed, scale, seed, jobs, numbers, norm, limit, dy, size, gradients) -> None:
        call, alive = self.call(networks, scale, seed, jobs, numbers, norm, limit, True)
        plan, table = Plan(), torch.tensor(jobs)
        the_call, operand, size = ctypes.byref(call), numbers[0], ctypes.c_int64(size)
        self.kernels.size("sk_inr_plan", the_call, pointer(table), operand, size, ctypes.byref(plan))
        self.plans.append(plan)
        assert list(gradients[0].shape) == [call.mlps, plan.numbers]
        assert gradients[1][0].numel() == plan.first_numbers
        rows, storage = plan.wave_tiles * plan.tile_rows, packing.STORAGE[operand]
        work = [
            torch.zeros(2 * plan.runs * 4, dtype=torch.int64),
            *(guarded((n,), storage) for n in ((call.depth + 1) * rows * call.hidden, call.depth * rows * call.hidden)),
            guarded((rows * call.outputs,), storage),
            *(
                guarded((n,), torch.float32)
                for n in (
                    rows * call.hidden, plan.wave_tiles * call.depth, plan.wave_tiles, alive[1].numel(), plan.partial,
                )
            ),
        ]  # fmt: skip
        tensors = [dy, *transposed, *work, *gradients[:2], None if scale is None else gradients[2]]
        buffers = Work(*map(pointer, tensors), len(gradients[2]))
        arguments = (the_call, pointer(table), ctypes.byref(buffers), operand, size)
        self.kernels.allow(*networks, scale, *alive, *tensors)
        self.kernels.launch("sk_inr_backward", *arguments)
        del alive


@contextmanager
def on_emulator(kernels: Kernels, operand: int):
    with pytest.MonkeyPatch.context() as patch:
        operators = Operators(kernels)
        patch.setattr(packing, "operators", lambda: operators)
        patch.setattr(packing, "available", lambda: True)
        patch.setattr(packing, "operand_of", lambda dtype: operand)
        yield operators
