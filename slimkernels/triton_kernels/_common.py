"""What the Triton kernels share: block sizes, the activations, the tf32 switch and the device guard."""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# About the multiprocessors of the GPUs at hand (A100: 108, H100: 132). A constant, so that no launch asks the driver.
MULTIPROCESSORS = 128


class Blocks(NamedTuple):
    """Sizes of a tile of a matrix product and how many warps and pipeline stages work on it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def block_of(size: int, most: int) -> int:
    """The smallest power of two from 16 (the least that a tensor core takes) to ``most`` that covers ``size``."""
    return min(most, max(16, triton.next_power_of_2(size)))


def strides(t: Tensor) -> tuple[int, ...]:
    """The strides that a kernel is given: 0 for a dimension of size 1, whatever the tensor says."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def aligned(*tensors: Tensor | None, sizes: tuple[int, ...] = ()) -> bool:
    """Whether Triton may load 16 bytes at once: all of ``sizes`` and all strides above 1 are multiples of 16."""
    given = [t for t in tensors if t is not None]
    steps = [stride for t in given for stride in strides(t) if stride != 1]
    return all(value % 16 == 0 for value in (*sizes, *steps, *(t.data_ptr() for t in given)))


def pick_blocks(
    m: int, n: int, k: int, bytes_per_element: int, precision: str, vectors: bool, most_n: int = 128
) -> Blocks:
    """Tile sizes for an (m, k) by (k, n) product; they depend on the sizes through a few thresholds only.

    ``vectors``: rows can be loaded 16 bytes at once. ``most_n``: the largest tile's columns.
    """
    if precision == "ieee" and bytes_per_element == 4:
        # No tensor core multiplies float32 exactly: the operands live in registers, and larger parts of a tile a thread
        # would spill.
        block_m, block_n = block_of(m, 64), block_of(n, 64)
        return Blocks(block_m, block_n, 16, 8 if block_m * block_n == 64 * 64 else 4, 2)
    block_m, block_n = block_of(m, 128), block_of(n, most_n)
    if not vectors:
        # Every element is loaded by itself and keeps an address in registers: larger parts a thread would spill.
        block_m, block_n = min(block_m, 64), min(block_n, 64)
        return Blocks(block_m, block_n, block_of(k, 32), 8 if block_m * block_n == 64 * 64 else 4, 3)
    # Fewer tiles than multiprocessors leave some idle: smaller tiles, as long as they still fill the tensor cores.
    while ceil_div(m, block_m) * ceil_div(n, block_n) < MULTIPROCESSORS and block_m * block_n > 64 * 64:
        if block_m >= block_n:
            block_m //= 2
        else:
            block_n //= 2
    # 128 bytes of k a row: one swizzled line of shared memory.
    block_k = block_of(k, 128 // bytes_per_element)
    # A warpgroup (4 warps) holds 64 rows of accumulators; two of them share the largest tiles.
    warps = 8 if block_m * block_n >= 128 * 128 else 4
    return Blocks(block_m, block_n, block_k, warps, 3)


def launch_options(blocks: Blocks) -> dict[str, int]:
    """Warps, stages and registers. Left to itself ptxas spills a few bytes to fit one block more on a multiprocessor."""
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return options if torch.version.hip else options | {"maxnreg": 255}


def pick_splits(tiles: int, reduction: int, block: int) -> int:
    """How many parts a long reduction is cut into, so that ``tiles`` output tiles keep all multiprocessors busy.

    The parts are summed in a second pass, in a fixed order. A part has at least 8 steps of ``block``: less does not
    pay for that pass.
    """
    if tiles >= MULTIPROCESSORS:
        return 1
    return max(1, min(ceil_div(2 * MULTIPROCESSORS, tiles), reduction // (8 * block)))


def matmul_precision(dtype: torch.dtype) -> str:
    """How a product of float32 is done: as ``torch.backends.cuda.matmul`` says ("tf32" on tensor cores, or "ieee")."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def conv_precision(dtype: torch.dtype) -> str:
    """The same for convolutions: ``torch.backends.cudnn.conv``, which is "tf32" unless told otherwise."""
    cudnn: Any = torch.backends.cudnn
    tf32 = dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def on_device(x: Tensor):
    """A context in which kernels are launched on the GPU that holds ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of tile ``pid``: ``GROUP`` rows of tiles at a time, so that neighbours share operands in L2."""
    group_size = GROUP * tiles_n
    first_m = pid // group_size * GROUP
    rows = tl.minimum(tiles_m - first_m, GROUP)
    within = pid % group_size
    return first_m + within % rows, within // rows


@triton.jit
def block_index(offs, part, full, BLOCKED: tl.constexpr):
    """Index in the parent of the active index ``offs``: blocks of ``full`` entries, the first ``part`` of each active."""
    if BLOCKED:
        offs = offs // part * full + offs % part
    return offs


@triton.jit
def apply_activation(x, ACTIVATION: tl.constexpr):
    """The activation of a float32 block; a NaN stays a NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "elu":
        x = tl.where(x > 0, x, tl.exp(x) - 1)
    elif ACTIVATION == "hardswish":
        x = x * tl.where(x < -3, 0.0, tl.where(x > 3, 6.0, x + 3)) / 6
    elif ACTIVATION == "tanh":
        decay = tl.exp(-2 * tl.abs(x))
        x = tl.where(x < 0, -1.0, 1.0) * (1 - decay) / (1 + decay)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    return x
