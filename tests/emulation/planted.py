"""A bug of every Triton kernel, and the ops with a copy of the kernels that has it: each rung must find it."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from slimkernels import ops, triton_kernels
from tests.emulation.launchers import registered
from tests.helpers import check_as_good_as_pytorch
from tests.ops import (
    test_slim_batch_norm,
    test_slim_conv,
    test_slim_group_norm,
    test_slim_layer_norm,
    test_slim_linear,
)

FOLDER = Path(triton_kernels.__file__).parent
TESTS = {
    "slim_batch_norm": test_slim_batch_norm,
    "slim_conv": test_slim_conv,
    "slim_group_norm": test_slim_group_norm,
    "slim_layer_norm": test_slim_layer_norm,
    "slim_linear": test_slim_linear,
}


@dataclass(frozen=True)
class Bug:
    kernel: str
    op: str  # that runs the kernel
    file: str
    old: str
    new: str


BUGS = {
    "mask of a product's sum": Bug(
        "_slim_linear_kernel", "slim_linear", "slim_linear", "mask_k = offs_k < k_part", "mask_k = offs_k <= k_part"
    ),
    "last row of a gradient's sum": Bug(
        "_slim_linear_bwd_w_kernel", "slim_linear", "slim_linear", "tl.minimum(first + rows_per_split, M)", "M + 1"
    ),
    "last tap": Bug(
        "_slim_conv_kernel", "slim_conv", "_conv", "count_w = 0, KH, 0, KW\n", "count_w = 0, KH, 0, KW - 1\n"
    ),
    "phase of a column": Bug(
        "_slim_conv_kernel", "slim_conv", "_conv", "tl.program_id(2) % stride_w", "tl.program_id(2) // stride_w"
    ),
    "padding of a gradient": Bug(
        "_slim_conv_bwd_w_kernel", "slim_conv", "_conv", "= kh * dilation_h - pad_h", "= kh * dilation_h + pad_h"
    ),
    "rows of a part": Bug(
        *("_channel_norm_statistics_kernel", "slim_batch_norm", "_channel_norm"),
        *("here = tl.minimum(ROWS - start, steps * BLOCK_R)", "here = steps * BLOCK_R"),
    ),
    "mask of the groups": Bug(
        *("_channel_norm_merge_kernel", "slim_group_norm", "_channel_norm"),
        *("mask_g = offs_g < all_groups", "mask_g = offs_g <= all_groups"),
    ),
    "batch of a group": Bug(
        *("_channel_norm_fwd_kernel", "slim_group_norm", "_channel_norm"),
        *("group = batch * groups + offs_c", "group = offs_c"),
    ),
    "place of a part's sums": Bug(
        *("_channel_norm_bwd_sums_kernel", "slim_group_norm", "_channel_norm_backward"),
        *("part.to(tl.int64) * (2 * C)", "part.to(tl.int64) * C"),
    ),
    "weight of a moment": Bug(
        *("_channel_norm_bwd_merge_kernel", "slim_batch_norm", "_channel_norm_backward"),
        *("moment_dz += dz * weight", "moment_dz += dz"),
    ),
    "moments of another batch": Bug(
        *("_channel_norm_bwd_x_kernel", "slim_group_norm", "_channel_norm_backward"),
        *("tl.load(moments_ptr + group,", "tl.load(moments_ptr + offs_c // group_size,"),
    ),
    "last row": Bug(
        *("_row_norm_fwd_kernel", "slim_layer_norm", "_row_norm"),
        *("mask_m = offs_m < M\n    x_rows", "mask_m = offs_m <= M\n    x_rows"),
    ),
    "features of a row": Bug(
        *("_row_norm_bwd_kernel", "slim_layer_norm", "_row_norm"),
        *("dx -= (tl.sum(g, 1) / C)", "dx -= (tl.sum(g, 1) / BLOCK_C)"),
    ),
    "entries outside the slice": Bug(
        *("_norm_bwd_w_kernel", "slim_layer_norm", "_norm"),
        *("tl.sum(dw, 0).to(dw_ptr.dtype.element_ty), mask=offs_c < FULL",),
        "tl.sum(dw, 0).to(dw_ptr.dtype.element_ty), mask=offs_c < C",
    ),
}


@contextlib.contextmanager
def kernels_with(bug: Bug | None, op: str, folder: Path) -> Iterator[None]:
    """Within it ``op`` runs, for CPU tensors, a copy of the kernels that is written below ``folder``."""
    name = f"planted_{folder.name.replace('-', '_')}"
    package = folder / name
    package.mkdir()
    for path in FOLDER.glob("*.py"):
        text = path.read_text().replace("slimkernels.triton_kernels", name)
        if bug is not None and path.stem == bug.file:
            assert text.count(bug.old) == 1, f"nothing, or too much, to break: {bug.old!r}"
            text = text.replace(bug.old, bug.new)
        (package / path.name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        module = importlib.import_module(f"{name}.{op}")
        if op == "slim_conv":
            patch.setattr(sys.modules[f"{name}._conv"], "conv_precision", lambda dtype: "ieee")
        try:
            with registered({kernel: getattr(module, kernel) for kernel in (op, f"{op}_backward")}):
                yield
        finally:
            for found in [one for one in sys.modules if one.partition(".")[0] == name]:
                del sys.modules[found]


def check(op: str) -> None:
    """A small ragged call, forward and backward."""
    tests = TESTS[op]
    if op == "slim_linear":
        args, kwargs = tests.sample(19, 21, 17, 30, 29, residual=True, activation="relu")
    elif op == "slim_conv":
        geometry = {"padding": 1, "stride": 2}
        args, kwargs = tests.sample(18, 7, 20, 9, (3, 3), (6, 5), channels_last=True, activation="relu", **geometry)
    elif op == "slim_layer_norm":
        args, kwargs = tests.sample((3, 17, 11), 16, residual=True, activation="relu")
    else:
        training = {"training": True} if op == "slim_batch_norm" else {"group_size": 4}
        args, kwargs = tests.sample((3, 17, 11), 22, residual=True, activation="relu", **training)
    check_as_good_as_pytorch(getattr(ops, op), tests.oracle, args, kwargs, torch.float32)
