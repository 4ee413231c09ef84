"""The published way to generate weights (Neural Metamorphosis), vectorised: every step on whole tensors.

Plain PyTorch only: the oracle of the ``inr_weights`` tests and the peer of its benchmark.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "elu": F.elu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def coordinates(tensor, c_out: int, c_in: int, norm: float, dtype: torch.dtype) -> Tensor:  # (N, 6)
    to, ti = tensor.tile
    a = torch.arange(0, c_out, to, dtype=dtype)
    b = torch.arange(0, c_in, ti, dtype=dtype)
    grid = torch.cartesian_prod(a, b).reshape(-1, 2)
    rest = torch.tensor([tensor.layer, tensor.layers, c_out, c_in], dtype=dtype).expand(len(grid), 4)
    x = torch.cat([rest[:, :1], grid, rest[:, 1:]], 1)
    divisor = torch.tensor([tensor.layers, *(tensor.positions or (c_out, c_in)), norm, norm, norm], dtype=dtype)
    return x / divisor


def encode(v: Tensor, bands: int, compat: str) -> Tensor:
    out = [v]
    for f in range(bands):
        angle = v * (2.0**f * math.pi)
        pair = [angle.sin(), angle.cos()]
        out.append(torch.stack(pair, -1).flatten(1) if compat == "neumeta" else torch.cat(pair, 1))
    return torch.cat(out, 1)


def evaluate(encoded: Tensor, parameters, mlp: int, activation: str) -> Tensor:
    w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out = (t[mlp] for t in parameters)
    act = ACTIVATIONS[activation]
    h = act(F.linear(encoded, w_in, b_in))
    for k in range(len(skip)):
        h = h + skip[k] * act(F.linear(h, w_hidden[k], b_hidden[k]))
    return F.linear(h, w_out, b_out)


def generate(
    parameters, tensors, active, *, norm, base=None, scale=None, activation="relu", compat="neumeta"
) -> list[Tensor]:
    """What ``slimkernels.ops.inr_weights`` computes without noise."""
    dtype = parameters[0].dtype
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32  # 16 bits cannot hold the angles
    bands = (parameters[0].shape[2] - 6) // 12
    weights = []
    for j, (c_out, c_in) in enumerate(active):
        t = j % len(tensors)
        tensor = tensors[t]
        to, ti = tensor.tile
        elements = math.prod(tensor.kernel)
        v = coordinates(tensor, c_out, c_in, norm, wide)
        w = evaluate(encode(v, bands, compat).to(dtype), parameters, tensor.mlp, activation) / c_in
        start = (w.shape[1] - elements * to * ti) // 2
        w = w[:, start : start + elements * to * ti]
        rows, cols = -(-c_out // to), -(-c_in // ti)
        w = w.reshape(rows, cols, to, ti, elements).transpose(1, 2).reshape(rows * to, cols * ti, elements)
        w = w[:c_out, :c_in].reshape(c_out, c_in, *tensor.kernel)
        if tensor.layout == "iohw":
            w = w.transpose(0, 1)
        if tensor.layout == "bias":
            w = w.flatten()
        if scale is not None:
            w = w * scale[t]
        if base is not None and base[t] is not None:
            w = w + base[t][tuple(slice(0, size) for size in w.shape[:2])]
        weights.append(w)
    return weights
