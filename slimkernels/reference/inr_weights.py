"""``inr_weights`` in plain PyTorch: the specification, the fallback and the test oracle.

The encoding is per axis, so the first layer is a sum of per-axis terms: ``z[o, i] = A[o] + B[i] + c`` with small tables
A and B (``_FirstLayer``). Only ``noise="element"``, which gives every coordinate its own offsets, needs all axes at every
coordinate.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.reference._activation import activation as apply_activation
from slimkernels.reference._activation import activation_backward

AXES = 6  # layer, output channel, input channel, number of layers, output channels, input channels
# Integers a tensor: mlp, layer, layers, kernel elements, tile_out, tile_in, layout, and the (output, input) channels that
# positions are divided by, 0 for the active ones.
SPEC = 9
LAYOUTS = ("oihw", "iohw", "channels_last", "bias")
OUTPUT_ACTIVATIONS = ("none", "relu", "elu", "relu6", "tanh", "sigmoid")  # derivative from the output
CHUNK = 32768  # coordinates evaluated at a time


class InrParameters(NamedTuple):
    """The P multi-layer perceptrons, stacked: hidden size H, D = layers - 1 residual layers, O output elements."""

    w_in: Tensor  # (P, H, E), E = 6 + 12 * bands
    b_in: Tensor  # (P, H)
    w_hidden: Tensor  # (P, D, H, H)
    b_hidden: Tensor  # (P, D, H)
    skip: Tensor  # (P, D): the residual scalars s_k
    w_out: Tensor  # (P, O, H)
    b_out: Tensor  # (P, O)


@dataclass(frozen=True)
class Job:
    """One tensor at one width."""

    tensor: int
    mlp: int
    layer: int
    layers: int
    kernel: int
    tile_out: int
    tile_in: int
    layout: int
    places_out: int
    places_in: int
    c_out: int
    c_in: int

    @property
    def rows(self) -> int:
        return -(-self.c_out // self.tile_out)

    @property
    def cols(self) -> int:
        return -(-self.c_in // self.tile_in)

    @property
    def emitted(self) -> int:
        return self.tile_out * self.tile_in * self.kernel

    @property
    def numel(self) -> int:
        return self.c_out * self.c_in * self.kernel

    def raw(self, axis: int) -> tuple[float, float]:
        """Step and offset of the coordinate's numerator on a scalar axis: ``step * (0 + noise) + offset``."""
        return 1.0, float((self.layer, 0, 0, self.layers, self.c_out, self.c_in)[axis])

    def divisor(self, axis: int, norm: float) -> float:
        places = self.places_out or self.c_out, self.places_in or self.c_in
        return float((self.layers, *places, norm, norm, norm)[axis])


def jobs(active: Sequence[int], spec: Sequence[int]) -> list[Job]:
    tensors = len(spec) // SPEC
    descriptors = [tuple(spec[t * SPEC : (t + 1) * SPEC]) for t in range(tensors)]
    return [
        Job(*[j % tensors, *descriptors[j % tensors], active[2 * j], active[2 * j + 1]])
        for j in range(len(active) // 2)
    ]


def _mix(x):
    """A 32-bit integer hash (a bijection); ``x`` is an int or an int64 tensor below 2**32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _known(seed: Tensor | None) -> int | Tensor:
    """A seed on the CPU as a number; one on a GPU stays there, as to read it would be to wait."""
    return 0 if seed is None else int(seed) if seed.device.type == "cpu" else seed


def noise_offsets(seed: int | Tensor, sample: int, tensor: int, axis: int, index: Tensor, limit: float) -> Tensor:
    """Uniform in [-0.5, 0.5) for each ``index`` (int64), clamped to +-``limit``; a function of its arguments alone."""
    key = _mix(_mix(_mix(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)) + sample & 0xFFFFFFFF)
    key = _mix(_mix(key + tensor & 0xFFFFFFFF) + axis & 0xFFFFFFFF)
    bits = _mix(_mix(index) ^ key) >> 8
    return (bits.double() * 2.0**-24 - 0.5).clamp(-limit, limit)


def axis_columns(axis: int, bands: int, order: str) -> list[int]:
    """Columns of the first weight that belong to one axis: v, then sin and cos of each band."""
    step, cosine = (2, 1) if order == "neumeta" else (1, AXES)
    columns = [axis]
    for band in range(bands):
        at = AXES + 2 * AXES * band + step * axis
        columns += [at, at + cosine]
    return columns


def encode_axis(v: Tensor, bands: int) -> Tensor:  # (n) -> (n, 1 + 2 * bands)
    frequencies = (1 << torch.arange(bands, device=v.device)).to(
        v.dtype
    ) * math.pi  # made on the device, not copied to it
    angle = v[:, None] * frequencies
    return torch.cat([v[:, None], torch.stack([angle.sin(), angle.cos()], -1).flatten(1)], 1)


class _Noise(NamedTuple):
    kind: str
    seed: int | Tensor
    limit: float


def axis_values(job: Job, axis: int, index: Tensor, noise: _Noise, sample: int, norm: float, like: Tensor) -> Tensor:
    """Coordinate values on one axis. ``index`` (int64): the row, the column or 0; for "element" the coordinate's own."""
    position = torch.zeros_like(index)
    if axis == 1:
        position = index // job.cols if noise.kind == "element" else index
    elif axis == 2:
        position = index % job.cols if noise.kind == "element" else index
    step = (1, job.tile_out, job.tile_in, 1, 1, 1)[axis]
    value = position.to(like.dtype) + job.raw(axis)[1]
    if noise.kind != "none":
        value = value + noise_offsets(noise.seed, sample, job.tensor, axis, index, noise.limit).to(like.dtype)
    return value * step / torch.full((), job.divisor(axis, norm), dtype=like.dtype, device=like.device)


class _FirstLayer:
    """Pre-activation of the first layer for rows ``first`` to ``last`` of a job, and its gradient."""

    def __init__(self, job, sample, first, last, w, b, noise, order, norm):
        self.job, self.first, self.last, self.w, self.b = job, first, last, w, b
        bands = (w.shape[1] - AXES) // (2 * AXES)
        self.columns = [torch.tensor(axis_columns(axis, bands, order), device=w.device) for axis in range(AXES)]
        self.element = noise.kind == "element"
        where = torch.arange(first * job.cols, last * job.cols, device=w.device)
        row, col = torch.arange(first, last, device=w.device), torch.arange(job.cols, device=w.device)
        one = torch.zeros(1, dtype=torch.int64, device=w.device)
        index = [where] * AXES if self.element else [one, row, col, one, one, one]
        self.encoded = [
            encode_axis(axis_values(job, axis, index[axis], noise, sample, norm, w), bands) for axis in range(AXES)
        ]

    def forward(self) -> Tensor:  # (rows * cols, H)
        terms = [e @ self.w[:, c].t() for e, c in zip(self.encoded, self.columns, strict=True)]
        scalar = terms[0] + terms[3] + terms[4] + terms[5] + self.b
        if self.element:
            return terms[1] + terms[2] + scalar
        return ((terms[1] + scalar)[:, None] + terms[2]).flatten(0, 1)

    def backward(self, dz: Tensor, dw: Tensor, db: Tensor) -> None:
        """Adds to the gradients of the first weight and bias."""
        grid = dz.unflatten(0, (self.last - self.first, self.job.cols))
        total = dz.sum(0)
        db += total
        by_axis = [total[None], grid.sum(1), grid.sum(0), total[None], total[None], total[None]]
        for axis, (e, c) in enumerate(zip(self.encoded, self.columns, strict=True)):
            dw[:, c] += (dz if self.element else by_axis[axis]).t() @ e


def _chunks(job: Job) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(job.cols, 1))
    return ((first, min(first + step, job.rows)) for first in range(0, job.rows, step))


def _middle(job: Job, w_out: Tensor) -> slice:
    start = (w_out.shape[0] - job.emitted) // 2
    return slice(start, start + job.emitted)


def _unpatch(job: Job, w: Tensor, rows: int, first: int) -> Tensor:
    """(rows * cols, tile_out * tile_in * kernel) to (output channels, input channels, kernel)."""
    w = w.reshape(rows, job.cols, job.tile_out, job.tile_in, job.kernel).transpose(1, 2)
    w = w.reshape(rows * job.tile_out, job.cols * job.tile_in, job.kernel)
    return w[: job.c_out - first * job.tile_out, : job.c_in]


def _patch(job: Job, w: Tensor, rows: int) -> Tensor:
    """The inverse of ``_unpatch``, with zeros beyond the ragged edge."""
    padded = w.new_zeros(rows * job.tile_out, job.cols * job.tile_in, job.kernel)
    padded[: w.shape[0], : w.shape[1]] = w
    w = padded.reshape(rows, job.tile_out, job.cols, job.tile_in, job.kernel).transpose(1, 2)
    return w.reshape(rows * job.cols, job.emitted)


def _to_layout(job: Job, w: Tensor) -> Tensor:
    """(c_out, c_in, kernel) in the order of the target's memory; ``_from_layout`` is its inverse."""
    return {0: w, 1: w.transpose(0, 1), 2: w.transpose(1, 2), 3: w}[job.layout].reshape(-1)


def _from_layout(job: Job, flat: Tensor) -> Tensor:
    if job.layout == 1:
        return flat.view(job.c_in, job.c_out, job.kernel).transpose(0, 1)
    if job.layout == 2:
        return flat.view(job.c_out, job.kernel, job.c_in).transpose(1, 2)
    return flat.view(job.c_out, job.c_in, job.kernel)


def base_slice(job: Job, base: Tensor) -> Tensor:  # (c_out, c_in, kernel)
    if job.layout == 3:
        return base[: job.c_out, None, None]
    if job.layout == 1:
        return base[: job.c_in, : job.c_out].transpose(0, 1).reshape(job.c_out, job.c_in, job.kernel)
    return base[: job.c_out, : job.c_in].reshape(job.c_out, job.c_in, job.kernel)


def hidden_forward(h: Tensor, w: Tensor, b: Tensor, skip: Tensor, activation: str, kept: Tensor | None) -> list[Tensor]:
    """The inputs of the residual layers and, last, the output of the last one.

    ``kept`` (n, D, H) receives what the derivative needs: each layer's activation output or, for some activations, its
    input.
    """
    inputs = [h]
    for k in range(w.shape[0]):
        z = torch.addmm(b[k], inputs[-1], w[k].t())
        r = apply_activation(z, activation)
        if kept is not None:
            kept[:, k] = r if activation in OUTPUT_ACTIVATIONS else z
        inputs.append(inputs[-1] + skip[k] * r)
    return inputs


def inr_weights(
    w_in: Tensor,  # (P, H, E); see InrParameters
    b_in: Tensor,
    w_hidden: Tensor,
    b_hidden: Tensor,
    skip: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    scale: Tensor | None,  # (T,)
    base: Sequence[Tensor],  # T tensors, those of no elements meaning none; or empty
    seed: Tensor | None,  # () int64
    active: Sequence[int],  # c_out, c_in of each job; job j is tensor j % T
    spec: Sequence[int],  # SPEC integers for each of the T tensors
    activation: str,
    order: str,  # of the encoding's columns
    norm: float,
    noise: str,
    limit: float,
    samples: int,
    first_sample: int,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:  # the weights of all jobs one after another; what backward reuses
    """``base[:c_out, :c_in] + scale * mean over samples of mlp(encoding) / c_in``, each job in its layout."""
    source = w_in.dtype
    mlps = _wide(w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out)
    noisy = _Noise(noise, _known(seed), limit)
    parts, saved = [], []
    for job in jobs(active, spec):
        p = InrParameters(*(t[job.mlp] for t in mlps))
        at = _middle(job, p.w_out)
        blocks = []
        kept = p.w_in.new_empty(
            samples, job.rows * job.cols, p.skip.shape[0] if save else 0, p.b_in.shape[0], dtype=source
        )
        for first, last in _chunks(job):
            mean = p.w_in.new_zeros(())
            for k in range(samples):
                z = _FirstLayer(job, first_sample + k, first, last, p.w_in, p.b_in, noisy, order, norm).forward()
                store = kept[k, first * job.cols : last * job.cols] if save else None
                h = hidden_forward(apply_activation(z, activation), p.w_hidden, p.b_hidden, p.skip, activation, store)[
                    -1
                ]
                mean = mean + torch.addmm(p.b_out[at], h, p.w_out[at].t()) / (job.c_in * samples)
            blocks.append(_unpatch(job, mean, last - first, first))
        w = torch.cat(blocks)
        if scale is not None:
            w = w * scale[job.tensor].to(w.dtype)
        if base and base[job.tensor].numel():
            w = w + base_slice(job, base[job.tensor]).to(w.dtype)
        parts.append(_to_layout(job, w).to(dtype))
        saved.append(kept.flatten())
    return torch.cat(parts), torch.cat(saved)


def inr_weights_backward(
    dy: Tensor,  # like the weights
    w_in: Tensor,
    b_in: Tensor,
    w_hidden: Tensor,
    b_hidden: Tensor,
    skip: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    saved: Tensor,  # (0) to recompute the hidden layers
    active: Sequence[int],
    spec: Sequence[int],
    activation: str,
    order: str,
    norm: float,
    noise: str,
    limit: float,
    samples: int,
    first_sample: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven parameter tensors and of ``scale`` (empty when there is none)."""
    source = w_in.dtype
    mlps = _wide(w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out)
    noisy = _Noise(noise, _known(seed), limit)
    grads = InrParameters(*(torch.zeros_like(t) for t in mlps))
    dscale = mlps.w_in.new_zeros(0 if scale is None else scale.shape[0])
    by_output = activation in OUTPUT_ACTIVATIONS
    depth, hidden = skip.shape[1], b_in.shape[1]
    start = saved_start = 0
    for job in jobs(active, spec):
        p, g = (InrParameters(*(t[job.mlp] for t in group)) for group in (mlps, grads))
        at = _middle(job, p.w_out)
        dw_full = _from_layout(job, dy[start : start + job.numel].to(p.w_in.dtype))
        start += job.numel
        size = samples * job.rows * job.cols * depth * hidden if saved.numel() else 0
        kept_all = saved[saved_start : saved_start + size].view(samples, -1, depth, hidden) if size else None
        saved_start += size
        for first, last in _chunks(job):
            rows = slice(first * job.tile_out, min(last * job.tile_out, job.c_out))
            dout = _patch(job, dw_full[rows], last - first) / (job.c_in * samples)
            for k in range(samples):
                layer = _FirstLayer(job, first_sample + k, first, last, p.w_in, p.b_in, noisy, order, norm)
                z = layer.forward()
                h = apply_activation(z, activation)
                if kept_all is None:
                    kept = z.new_empty(z.shape[0], depth, hidden)
                    inputs = hidden_forward(h, p.w_hidden, p.b_hidden, p.skip, activation, kept)
                else:
                    kept = kept_all[k, first * job.cols : last * job.cols].to(z.dtype)
                    inputs = [h]
                    for d in range(depth):
                        r = kept[:, d] if by_output else apply_activation(kept[:, d], activation)
                        inputs.append(inputs[-1] + p.skip[d] * r)
                if scale is not None:
                    dscale[job.tensor] += (dout * torch.addmm(p.b_out[at], inputs[-1], p.w_out[at].t())).sum()
                dscaled = dout if scale is None else dout * scale[job.tensor].to(dout.dtype)
                g.w_out[at] += dscaled.t() @ inputs[-1]
                g.b_out[at] += dscaled.sum(0)
                dh = dscaled @ p.w_out[at]
                for d in reversed(range(depth)):
                    r = kept[:, d] if by_output else apply_activation(kept[:, d], activation)
                    g.skip[d] += (dh * r).sum()
                    dz = activation_backward(dh * p.skip[d], kept[:, d], activation)
                    g.w_hidden[d] += dz.t() @ inputs[d]
                    g.b_hidden[d] += dz.sum(0)
                    dh = torch.addmm(dh, dz, p.w_hidden[d])
                layer.backward(activation_backward(dh, h if by_output else z, activation), g.w_in, g.b_in)
    w, b, wh, bh, sk, wo, bo = (t.to(source) for t in grads)
    return w, b, wh, bh, sk, wo, bo, dscale.to(source)


def _wide(*tensors: Tensor) -> InrParameters:
    """16-bit parameters are computed in float32."""
    return InrParameters(*(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors))
