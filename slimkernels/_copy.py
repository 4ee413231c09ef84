"""Copies of modules."""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def deep_copy(model: M, memo: dict[int, Any] | None = None) -> M:
    """``copy.deepcopy``, also of a model that keeps results of a computation (a cache of its last forward, the weight
    that ``weight_norm`` computes): Python cannot copy a tensor with a gradient history; the copy gets its values."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if tensor.grad_fn is not None:
                memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in list(value.values()) if isinstance(value, dict) else value:
            yield from _tensors(item)
