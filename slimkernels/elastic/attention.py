"""``nn.MultiheadAttention`` for the converter: which axes of its weights are cut.

The sides of an attention layer: ``in``, ``key`` and ``value``, the features that it takes in (one dimension where they
have one packed weight); ``heads``, the channels of its heads; ``rows``, the same for q, k and v, as three blocks. A width
dimension of its own switches whole heads on and off. What comes out belongs to ``out_proj``, a linear layer inside of it
which takes the heads in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.nn.attention import first_heads

ATTENTION = (nn.MultiheadAttention,)
SIDES = {"in": "embed_dim", "key": "kdim", "value": "vdim", "heads": "", "rows": ""}
_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


@contextmanager
def inference_path_off() -> Iterator[None]:
    """Torch's transformer layers run their modules, not one operation past them which no hook or changed forward is in."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def out_proj_of(name: str) -> str:
    return f"{name}.out_proj" if name else "out_proj"


def out_projections(model: nn.Module) -> dict[str, str]:
    """Names of the linear layers that end an attention -> name of the attention."""
    return {out_proj_of(name): name for name, module in model.named_modules() if isinstance(module, ATTENTION)}


def size_of(module: Any, side: str) -> int:
    """Full size of a side."""
    if side in ("heads", "rows"):
        return module.num_heads * module.head_dim * (3 if side == "rows" else 1)
    return getattr(module, SIDES[side])


def axes_of(module: Any) -> dict[str, dict[int, str]]:
    """Parameter name -> {axis: side}."""
    found: dict[str, dict[int, str]] = {"in_proj_weight": {0: "rows", 1: "in"}, "in_proj_bias": {0: "rows"}}
    found |= {f"{name[0]}_proj_weight": {0: "heads", 1: side} for name, side in zip("qkv", SIDES, strict=False)}
    return found | {"bias_k": {2: "heads"}, "bias_v": {2: "heads"}}


def same_units(module: Any, name: str) -> Iterator[tuple[tuple[tuple[str, str], int], tuple[tuple[str, str], int]]]:
    """Pairs of ((module, side), position) that are there together: a head as a whole, and one feature of a packed weight."""
    n, size = size_of(module, "heads"), module.head_dim
    for i in range(n):
        head = (name, "heads"), i // size * size
        yield head, ((name, "heads"), i)
        yield head, ((out_proj_of(name), "in"), i)
        for block in range(3):
            yield head, ((name, "rows"), block * n + i)
    if module.in_proj_weight is not None:
        for i in range(module.embed_dim):
            for side in ("key", "value"):
                yield ((name, "in"), i), ((name, side), i)


def called_with(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(_ARGUMENTS, args, strict=False)) | kwargs


def macs_of(module: Any, name: str, call: dict[str, Any]) -> list[tuple[str, tuple[str, str], int]]:
    """(module, (side taken in, side put out), multiplications by a matrix of that size) of one call.

    Products of activations are counted as channels of the heads times steps times keys, with no side put out.
    """
    query, key = call["query"], call["key"]
    steps, keys = (t.numel() // t.shape[-1] for t in (query, key))
    batch = query.shape[0 if module.batch_first else 1] if query.dim() == 3 else 1
    attended = keys // batch + (module.bias_k is not None) + module.add_zero_attn
    found = [(name, ("in", "heads"), steps), (name, ("key", "heads"), keys), (name, ("value", "heads"), keys)]
    return [*found, (name, ("heads", ""), 2 * steps * attended), (out_proj_of(name), ("in", "out"), steps)]


@dataclass(frozen=True)
class CutMasks:
    """Hook before a forward: of masks that the network writes for all heads, those of the first."""

    full: int  # heads

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        call = called_with(args, kwargs)
        if call.get("attn_mask") is not None:
            mask = first_heads(call["attn_mask"], call["query"], module.batch_first, self.full, module.num_heads)
            call["attn_mask"] = mask
        return (), call


def has_all_masks(module: Any, heads: int, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an attention of fewer heads is called with masks for all of them."""
    call = called_with(args, kwargs)
    mask = call.get("attn_mask")
    return (
        mask is not None and first_heads(mask, call["query"], module.batch_first, module.num_heads, heads) is not mask
    )


def average_over(module: Any, channels: int) -> Any:
    """A forward whose attention weights are those of the first heads; what comes out is left to ``out_proj``."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = called_with(args, kwargs)
        average = call.get("average_attn_weights", True)
        y, weights = plain(**(call | {"average_attn_weights": False}))
        if weights is not None:
            weights = weights.narrow(-3, 0, channels // module.head_dim)
            weights = weights.mean(-3) if average else weights
        return y, weights

    return forward
