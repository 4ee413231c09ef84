"""What the norms' launchers launch for the shapes that rung T2 compiles and the table of kernels tells of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimkernels.triton_kernels import slim_batch_norm, slim_group_norm, slim_layer_norm, slim_rms_norm

OPS = ["slim_batch_norm", "slim_group_norm", "slim_layer_norm", "slim_rms_norm"]
DIRECTIONS = ["forward", "backward"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CHANNEL_LAYOUTS = ["channels-last", "channels-first", "ragged"]
LAYOUTS = {op: ["rows", "ragged"] if op in OPS[2:] else CHANNEL_LAYOUTS for op in OPS}
SHAPES = {"channels-last": (8, 64, 28, 28), "channels-first": (8, 64, 28, 28), "rows": (8, 196, 768)}
RAGGED = (7, 61, 57)


def problem(op: str, direction: str, dtype: torch.dtype, layout: Any) -> tuple[Callable[[], Any], list[Tensor]]:
    """A call of the launcher with a residual, gelu and every gradient, and the tensors it must read.

    ``layout``: a name of ``LAYOUTS[op]``, or a shape.
    """
    shape = layout if isinstance(layout, tuple) else RAGGED if layout == "ragged" else SHAPES[layout]
    x = torch.randn(shape).to(dtype)
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    dy, residual = torch.randn_like(x), torch.randn_like(x)
    rows = op in OPS[2:]
    c = shape[-1] if rows else shape[1]
    weight, bias = (torch.randn(c + 3).to(dtype) for _ in range(2))
    module = {
        m.__name__.rpartition(".")[2]: m for m in (slim_batch_norm, slim_group_norm, slim_layer_norm, slim_rms_norm)
    }
    forward, backward = (getattr(module[op], name) for name in (op, f"{op}_backward"))
    needs = [True] * (3 if op == "slim_rms_norm" else 4)
    size = 16
    if op == "slim_batch_norm":
        mean, spread = torch.zeros(c), torch.ones(c)
        first = (x, None, None, weight, bias, True, 1e-5, "gelu", residual)
        then = (dy, x, mean, spread, weight, bias, None, residual, True, 1e-5, "gelu", *needs)
    elif op == "slim_group_norm":
        mean, spread = torch.zeros(shape[0], -(-c // size)), torch.ones(shape[0], -(-c // size))
        first = (x, weight, bias, size, 1e-5, "gelu", residual)
        then = (dy, x, mean, spread, weight, bias, None, residual, size, "gelu", *needs)
    elif op == "slim_layer_norm":
        mean, spread = torch.zeros(shape[:-1]), torch.ones(shape[:-1])
        first = (x, weight, bias, 1e-5, "gelu", residual)
        then = (dy, x, mean, spread, weight, bias, None, residual, "gelu", *needs)
    else:
        spread = torch.ones(shape[:-1])
        first = (x, weight, 1e-5, "gelu", residual)
        then = (dy, x, spread, weight, None, residual, "gelu", *needs)
    function, args = (forward, first) if direction == "forward" else (backward, then)
    return lambda: function(*args), [a for a in args if isinstance(a, Tensor)]


def launches(op: str, direction: str, dtype: torch.dtype, layout: Any) -> list:
    from tests.emulation.capture import capture

    call, _ = problem(op, direction, dtype, layout)
    return capture(call)
