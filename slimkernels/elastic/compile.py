"""``compile``: torch.compile for an elastic model, with few graphs for all its widths."""

import inspect
import math
from typing import Any

import torch
from torch import nn

from slimkernels.elastic.plan import plan

_DYNAMO_LIMIT = 8  # graphs that torch.compile allows by itself
_DEPTHS = 64  # combinations of depths to allow graphs for


def compile(model: nn.Module, **kwargs: Any) -> Any:
    """``torch.compile`` (same keywords), for any number of widths.

    One graph is made for the first width and one, with the widths as dynamic integers, for all others; the width is set
    as before, on the compiled model or on the one given. Where widths differ in more than numbers there is a graph for
    each kind: with switchable batch norm one for each listed width, for a dict one for each set of dimensions that are
    full, and one for each combination of depths that is run, as every one is another sequence of blocks.

    Raises: ValueError when the model was not made by ``convert``.
    """
    known = plan(model)
    kinds = len(known.widths) if known.norm == "switchable" else 1
    kinds *= min(math.prod(len(stage.blocks) for stage in known.stages.values()), _DEPTHS)
    # Past its limit Dynamo would run eagerly without a word: a listed width or a depth must not do that.
    # Older torch has no such keyword.
    if kinds > 1 and "recompile_limit" in inspect.signature(torch.compile).parameters:
        kwargs.setdefault("recompile_limit", _DYNAMO_LIMIT + 2 * kinds)
    return torch.compile(model, **kwargs)
