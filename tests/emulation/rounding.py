"""Numbers as a GPU rounds them, in numpy: bfloat16 is kept as its 16 bits, TF32 as float32 with a short mantissa."""

import numpy as np


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of float32 ``values`` rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 ``values`` with 10 bits of mantissa, rounded to nearest, ties away from zero (``cvt.rna.tf32.f32``)."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)
