"""``inr_weights`` in CUDA C++: the networks packed for the kernels, the table of jobs, and the calls."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.cuda_kernels import available, operators
from slimkernels.ops._common import ACTIVATIONS
from slimkernels.reference import inr_weights as reference
from slimkernels.reference.inr_weights import AXES, Job
from slimkernels.reference.inr_weights import jobs as reference_jobs

NOISE = ("none", "axis", "element")
# Storage of what is multiplied, as SkOperand numbers it.
FLOAT, TF32, BFLOAT16, HALF = range(4)
STORAGE = {FLOAT: torch.float32, TF32: torch.float32, BFLOAT16: torch.bfloat16, HALF: torch.float16}
HIDDEN = (64, 128, 256, 512)  # sizes the kernels are compiled for; others are padded
CHUNK = 64  # outputs are padded to a multiple
MOST_OUTPUTS = 128
WORK_BYTES = 256 * 2**20  # of activations and their gradients, and of partial sums, that backward holds at a time
MOST_COLUMNS = 6 + 12 * 24  # of w_in: the encodings of a tile lie in shared memory
KERNEL_ACTIVATIONS = ("relu", "elu", "gelu", "silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Packed(NamedTuple):
    """The networks as the kernels read them: float32 but for the two matrices that are multiplied."""

    w_in: Tensor  # (P, 6, 1 + 2 bands, hidden)
    b_in: Tensor  # (P, hidden)
    w_hidden: Tensor  # (P, D, hidden, hidden)
    b_hidden: Tensor  # (P, D, hidden)
    skip: Tensor  # (P, D)
    w_out: Tensor  # (P, outputs, hidden)
    b_out: Tensor  # (P, outputs)


class JobTable(NamedTuple):
    rows: list[list[int]]  # one a job, as SkInrJob
    tiles: int
    table_rows: int  # of the first layer's tables


def padded_hidden(hidden: int, outputs: int) -> int:
    """The size that a network is padded to; backward has the padded outputs in the room of the hidden layers."""
    return next(size for size in HIDDEN if size >= max(hidden, -(-outputs // CHUNK) * CHUNK))


def tile_rows(hidden: int) -> int:
    """Coordinates that a block computes together."""
    return 32 if hidden > 256 else 64


def round_to_tf32(x: Tensor) -> Tensor:
    """The nearest numbers with 10 bits of mantissa: tensor cores drop the others."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def operand_matrix(w: Tensor, rows: int, columns: int, operand: int) -> Tensor:
    """The last two dimensions padded with zeros, in the storage of the operand."""
    w = F.pad(w, (0, columns - w.shape[-1], 0, rows - w.shape[-2])).to(STORAGE[operand])
    return round_to_tf32(w) if operand == TF32 else w.contiguous()


def by_axis(w_in: Tensor, order: str) -> Tensor:
    """(P, H, 6 + 12 bands) to (P, 6, 1 + 2 bands, H): the value's column, then sine and cosine of each band."""
    count, hidden, columns = w_in.shape
    bands = (columns - AXES) // (2 * AXES)
    value = w_in[:, :, :AXES].permute(0, 2, 1).unsqueeze(2)
    waves = w_in[:, :, AXES:]
    if order == "neumeta":
        waves = waves.reshape(count, hidden, bands, AXES, 2).permute(0, 3, 2, 4, 1)
    else:
        waves = waves.reshape(count, hidden, bands, 2, AXES).permute(0, 4, 2, 3, 1)
    return torch.cat([value, waves.reshape(count, AXES, 2 * bands, hidden)], 2)


def from_axes(w: Tensor, order: str) -> Tensor:
    """The inverse of ``by_axis``."""
    count, _, encoded, hidden = w.shape
    bands = (encoded - 1) // 2
    value = w[:, :, 0].permute(0, 2, 1)
    waves = w[:, :, 1:].reshape(count, AXES, bands, 2, hidden)
    waves = waves.permute(0, 4, 2, 1, 3) if order == "neumeta" else waves.permute(0, 4, 2, 3, 1)
    return torch.cat([value, waves.reshape(count, hidden, 2 * AXES * bands)], 2)


def pack(parameters: Sequence[Tensor], operand: int, order: str) -> Packed:
    w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out = parameters
    hidden = padded_hidden(w_in.shape[1], w_out.shape[1])
    more = hidden - w_in.shape[1]
    outputs = -(-w_out.shape[1] // CHUNK) * CHUNK
    return Packed(
        F.pad(by_axis(w_in.float(), order), (0, more)),
        F.pad(b_in.float(), (0, more)),
        operand_matrix(w_hidden, hidden, hidden, operand),
        F.pad(b_hidden.float(), (0, more)),
        skip.float().contiguous(),
        operand_matrix(w_out, outputs, hidden, operand),
        F.pad(b_out.float(), (0, outputs - b_out.shape[1])),
    )


def total(active: Sequence[int], spec: Sequence[int]) -> int:
    return sum(job.numel for job in reference_jobs(active, spec))


def base_strides(job: Job, base: Tensor | None) -> tuple[int, int, int, int] | None:
    """Address and strides of output channel, input channel and kernel element; None when those do not suffice."""
    if base is None or not base.numel():
        return 0, 0, 0, 0
    channels = 1 if job.layout == 3 else 2
    kernel = [(n, s) for n, s in zip(base.shape[channels:], base.stride()[channels:], strict=True) if n > 1]
    for (_, outer), (n, inner) in itertools.pairwise(kernel):
        if outer != n * inner:
            return None
    out, into = (1, 0) if job.layout == 1 else (0, 1)
    return base.data_ptr(), base.stride(out), base.stride(into) if channels == 2 else 0, kernel[-1][1] if kernel else 0


def job_table(
    active: Sequence[int], spec: Sequence[int], base: Sequence[Tensor | None], samples: int, tile: int, noise: str,
    per_sample: bool,
) -> JobTable:  # fmt: skip
    """The jobs sorted by network, so that tiles of one network are neighbours."""
    rows, start, tiles, table_rows = [], 0, 0, 0
    starts = []
    found = reference_jobs(active, spec)
    for job in found:
        starts.append(start)
        start += job.numel
    for j in sorted(range(len(found)), key=lambda j: found[j].mlp):
        job = found[j]
        where = base_strides(job, base[job.tensor] if base else None)
        assert where is not None
        count = -(-(job.rows * job.cols) // tile)
        rows.append([
            job.tensor, job.mlp, job.layer, job.layers, job.kernel, job.tile_out, job.tile_in, job.layout, job.c_out,
            job.c_in, job.places_out or job.c_out, job.places_in or job.c_in, starts[j], tiles, count, table_rows, *where,
        ])  # fmt: skip
        tiles += count * (samples if per_sample else 1)
        table_rows += samples * (job.rows + job.cols) if noise != "element" else 0
    return JobTable(rows, tiles, table_rows)


def operand_of(dtype: torch.dtype) -> int:
    """16-bit networks are multiplied in their dtype, float32 in tf32 where torch's switch for matrix products allows it."""
    if dtype == torch.float32:
        return TF32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else FLOAT
    return BFLOAT16 if dtype == torch.bfloat16 else HALF


def shared_bytes(hidden: int, outputs: int, bands: int, operand: int) -> int:
    """Of shared memory that a block takes: ``sk_inr_shared`` of the padded sizes."""
    size = STORAGE[operand].itemsize
    rows, outputs = tile_rows(hidden), -(-outputs // CHUNK) * CHUNK
    staged, stages = (max(hidden, CHUNK), 3) if hidden <= 128 else (hidden // 2, 3 if hidden == 256 else 2)
    room = max(stages * staged * 80, rows * (1 + 2 * bands) * 4)
    return 256 + rows * (hidden * size + 16) + room + rows * outputs * 4


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; on the tests' emulator those of the smallest data-centre GPU."""
    if device.type != "cuda":
        return 163 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024  # which CUDA keeps


def takes(w_in: Tensor, skip: Tensor, outputs: int, active, spec, base, activation: str, dtype: torch.dtype) -> bool:
    """Whether the kernels compute this call; the sizes are those of their shared memory and registers."""
    if activation not in KERNEL_ACTIVATIONS or dtype not in DTYPES or w_in.dtype not in DTYPES:
        return False
    if w_in.shape[1] > HIDDEN[-1] or outputs > MOST_OUTPUTS or w_in.shape[2] > MOST_COLUMNS or not active:
        return False
    bands, numbers = (w_in.shape[2] - AXES) // (2 * AXES), (padded_hidden(w_in.shape[1], outputs), outputs)
    if shared_bytes(*numbers, bands, operand_of(w_in.dtype)) > shared_limit(w_in.device):
        return False
    strided = not base or all(base_strides(job, base[job.tensor]) is not None for job in reference_jobs(active, spec))
    return strided and available()


def inr_weights(
    w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out, scale, base, seed, active, spec, activation, order, norm, noise,
    limit, samples, first_sample, dtype, save,
):  # fmt: skip
    """As the reference of this name. Hidden activations are never kept: backward computes them again."""
    base = list(base)
    if save or not takes(w_in, skip, w_out.shape[1], active, spec, base, activation, dtype):
        return reference.inr_weights(
            w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out, scale, base, seed, active, spec, activation, order, norm,
            noise, limit, samples, first_sample, dtype, save,
        )  # fmt: skip
    operand = operand_of(w_in.dtype)
    samples = 1 if noise == "none" else samples  # all are the same
    packed = pack((w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out), operand, order)
    tile = tile_rows(packed.w_in.shape[-1])
    rows = [n for row in job_table(active, spec, base, samples, tile, noise, False).rows for n in row]
    weights = w_in.new_empty(total(active, spec), dtype=dtype)
    numbers = [
        operand, ACTIVATIONS.index(activation), int(order == "neumeta"), NOISE.index(noise), samples, first_sample,
        w_out.shape[1],
    ]  # fmt: skip
    wide = None if scale is None else scale.float().contiguous()
    operators().inr_forward(list(packed), wide, base, seed, rows, numbers, norm, limit, weights)
    return weights, w_in.new_empty(0)


def inr_weights_backward(
    dy, w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out, scale, seed, saved, active, spec, activation, order, norm,
    noise, limit, samples, first_sample,
):  # fmt: skip
    """As the reference of this name. Kernels compute the hidden layers again and run the gradient back through them, as
    many coordinates at a time as fit ``WORK_BYTES``, and multiply and sum what they wrote, in a fixed order."""
    parameters = (w_in, b_in, w_hidden, b_hidden, skip, w_out, b_out)
    if saved.numel() or not takes(w_in, skip, w_out.shape[1], active, spec, [], activation, dy.dtype):
        return reference.inr_weights_backward(
            dy, *parameters, scale, seed, saved, active, spec, activation, order, norm, noise, limit, samples,
            first_sample,
        )  # fmt: skip
    operand = operand_of(w_in.dtype)
    samples = 1 if noise == "none" else samples
    packed = pack(parameters, operand, order)
    transposed = [t.transpose(-1, -2).contiguous() for t in (packed.w_hidden, packed.w_out)]
    tile = tile_rows(packed.w_in.shape[-1])
    rows = [n for row in job_table(active, spec, [], samples, tile, noise, True).rows for n in row]
    numbers = [
        operand, ACTIVATIONS.index(activation), int(order == "neumeta"), NOISE.index(noise), samples, first_sample,
        w_out.shape[1],
    ]  # fmt: skip
    wide = None if scale is None else scale.float().contiguous()
    gradients = Gradients(
        packed.b_in.new_zeros(packed.b_in.shape[0], gradient_numbers(packed)),
        packed.b_in.new_zeros(packed.b_in.shape[0], AXES * packed.w_in.shape[2] + 1, packed.b_in.shape[1]),
        packed.b_in.new_zeros(0 if scale is None else scale.shape[0]),
    )
    operators().inr_backward(
        list(packed), transposed, wide, seed, rows, numbers, norm, limit, dy.float().contiguous(), WORK_BYTES,
        list(gradients),
    )  # fmt: skip
    return unpack(gradients, packed, parameters, order)


class Gradients(NamedTuple):
    """What backward adds to, in float32."""

    hidden: Tensor  # (P, numbers): of w_hidden, w_out, b_hidden, b_out and skip, one after another
    first: Tensor  # (P, 6 (1 + 2 bands) + 1, hidden): of w_in and b_in
    scale: Tensor  # (T,), or (0,) without scales


def gradient_numbers(packed: Packed) -> int:
    """Of a network, a multiple of 4."""
    depth, hidden, outputs = packed.skip.shape[1], packed.b_in.shape[1], packed.b_out.shape[1]
    matrices = depth * hidden + outputs
    return -(-(matrices * hidden + matrices + depth) // 4) * 4


def unpack(gradients: Gradients, packed: Packed, parameters: Sequence[Tensor], order: str) -> tuple[Tensor, ...]:
    """The padded gradients in the parameters' shapes and dtype."""
    hidden, outputs, dtype = parameters[0].shape[1], parameters[5].shape[1], parameters[0].dtype
    like = (packed.w_hidden, packed.w_out, packed.b_hidden, packed.b_out, packed.skip)
    parts = gradients.hidden.split([*(t[0].numel() for t in like), gradients.hidden.shape[1] - count_of(like)], 1)
    w_hidden, w_out, b_hidden, b_out, skip = (p.reshape(t.shape) for p, t in zip(parts, like, strict=False))
    results = (
        from_axes(gradients.first[:, :-1].reshape(packed.w_in.shape)[..., :hidden], order),
        gradients.first[:, -1, :hidden],
        w_hidden[..., :hidden, :hidden],
        b_hidden[..., :hidden],
        skip,
        w_out[:, :outputs, :hidden],
        b_out[:, :outputs],
    )
    return *(t.to(dtype).contiguous() for t in results), gradients.scale.to(dtype)


def count_of(stacked: Sequence[Tensor]) -> int:
    """Numbers of one network in all of ``stacked``."""
    return sum(t[0].numel() for t in stacked)
