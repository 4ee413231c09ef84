"""Block slices: a dimension made of equal parts, each cut to its first entries."""

from torch import Tensor


def block_slice(t: Tensor, dim: int, active: int, blocks: int = 1) -> Tensor:
    """The first ``active // blocks`` entries of each of ``blocks`` equal parts of dimension ``dim``, side by side.

    One block gives a view; more blocks give a copy unless nothing is cut.
    """
    if blocks == 1:
        return t.narrow(dim, 0, active)
    return t.unflatten(dim, (blocks, -1)).narrow(dim + 1, 0, active // blocks).flatten(dim, dim + 1)


def block_unslice(t: Tensor, dim: int, full: int, blocks: int = 1) -> Tensor:
    """The inverse of ``block_slice``: zeros of size ``full`` along ``dim`` with ``t`` in the active entries."""
    shape = list(t.shape)
    shape[dim] = full
    out = t.new_zeros(shape)
    if blocks == 1:
        out.narrow(dim, 0, t.shape[dim]).copy_(t)
    else:
        parts = t.unflatten(dim, (blocks, -1))
        out.unflatten(dim, (blocks, -1)).narrow(dim + 1, 0, parts.shape[dim + 1]).copy_(parts)
    return out
