"""The operators of ``inr_weights`` on the emulator: the op's own Python packs and calls, only the library is another."""

import ctypes
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from slimkernels.cuda_kernels import inr_weights as packing
from tests.emulation.cuda.library import DTYPES, Kernels, pointer

OPERANDS = ("float", "tf32", "bfloat16", "half")
STEMS = ("inr_weights", *(f"inr_weights_{o}" for o in OPERANDS), *(f"inr_weights_{o}_backward" for o in OPERANDS))
COLUMNS = 18  # integers a job
FLOAT_STEMS = ("inr_weights", "inr_weights_float", "inr_weights_float_backward")  # enough for operand 0
POINTERS = ("w_in", "b_in", "w_hidden", "b_hidden", "skip", "w_out", "b_out", "scale", "jobs", "seed", "tables")
INTEGERS = (
    "seed_value", "job_count", "tiles", "table_rows", "mlps", "hidden", "depth", "outputs", "real_outputs", "bands",
    "samples", "first_sample", "noise", "neumeta", "activation",
)  # fmt: skip


class Call(ctypes.Structure):
    """``SkInr``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("norm", ctypes.c_float),
        ("limit", ctypes.c_float),
    ]


class Wave(ctypes.Structure):
    """``SkInrBackward``."""

    _fields_ = [
        *(
            (n, ctypes.c_void_p)
            for n in ("dy", "w_hidden", "w_out", "inputs", "gradients", "results", "first", "dskip")
        ),
        ("dscale", ctypes.c_void_p),
        ("first_tile", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
    ]


class Operators:
    """What csrc/cuda/binding_inr.cpp offers, with the emulator's launchers behind it."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def call(self, networks, scale, seed, jobs, numbers, norm, limit, per_sample) -> tuple[Call, list[Tensor]]:
        _, activation, neumeta, noise, samples, first_sample, real_outputs = numbers
        table = torch.tensor(jobs).view(-1, COLUMNS)
        rows = samples * (-(-table[:, 8] // table[:, 5]) - (-table[:, 9] // table[:, 6]))
        hidden = networks[0].shape[-1]
        tables = torch.full((0 if noise == 2 else int(rows.sum()), hidden), float("nan"))
        uploaded = torch.zeros_like(table)
        self.kernels.launch("sk_upload", pointer(uploaded), pointer(table), ctypes.c_int64(table.numel() * 8))
        assert torch.equal(uploaded, table)
        assert self.kernels.size("sk_inr_tile", ctypes.c_int64(hidden), int(per_sample)) == packing.tile_rows(
            hidden, per_sample
        )
        call = Call(
            *(pointer(t) for t in networks), pointer(scale), pointer(uploaded), None, pointer(tables),
            0 if seed is None else int(seed), len(table), int(table[:, 12].sum()) * (samples if per_sample else 1),
            len(tables), networks[0].shape[0], hidden, networks[4].shape[1], networks[6].shape[1], real_outputs,
            (networks[0].shape[2] - 1) // 2, samples, first_sample, noise, neumeta, activation, norm, limit,
        )  # fmt: skip
        return call, [uploaded, tables]

    def inr_forward(self, networks, scale, base, seed, jobs, numbers, norm, limit, weights) -> None:
        call, alive = self.call(networks, scale, seed, jobs, numbers, norm, limit, False)
        weights.fill_(float("nan"))
        self.kernels.launch("sk_inr_forward", ctypes.byref(call), pointer(weights), numbers[0], DTYPES[weights.dtype])
        del alive

    def inr_backward(self, networks, transposed, scale, seed, jobs, numbers, norm, limit, dy, first, wave) -> None:
        call, alive = self.call(networks, scale, seed, jobs, numbers, norm, limit, True)
        for t in wave:
            t.fill_(float("nan"))
        pointers = [pointer(t) for t in (dy, *transposed, *wave)]
        buffers = Wave(*pointers, first, len(wave[-1]))
        self.kernels.launch("sk_inr_backward", ctypes.byref(call), ctypes.byref(buffers), numbers[0])
        del alive


@contextmanager
def on_emulator(kernels: Kernels, operand: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "operators", lambda: Operators(kernels))
        patch.setattr(packing, "available", lambda: True)
        patch.setattr(packing, "operand_of", lambda dtype: operand)
        yield
