"""``calibrate``: batch-norm statistics of all widths in one pass over the data."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimkernels.elastic.plan import Depth, plan, unwrap
from slimkernels.elastic.trace import as_call
from slimkernels.elastic.transform import batch_norms
from slimkernels.elastic.width import set_width
from slimkernels.nn._statistics import CalibratedStatistics


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable, widths: Sequence[float] | None = None, *, depth: Depth = None
) -> None:
    """Measure the batch-norm statistics of ``widths``, each the average over all batches.

    The data is read once; every batch runs at every width. Nothing else about the model changes: the width, training
    mode and gradients are afterwards what they were. When the loader or the model raises, the old statistics are back.

    Args:
        batches: of inputs, or of tuples (inputs, targets); inputs is a tensor, a tuple of arguments or a dict of
            keywords.
        widths: ratios; None takes all listed ones. The full width keeps the statistics it was trained with unless it is
            among them.
        depth: of the networks that are measured, as in ``set_width``. Statistics belong to a width, not to a depth: those
            of another depth are replaced, so calibrate for the depth that is about to be evaluated or extracted.

    Raises: ValueError when a width or the depth is not a legal one, there are no batches, or nothing in the model has such
        statistics.
    """
    known = plan(model)
    inner = unwrap(model)
    if widths is None:
        if not known.listed:
            raise ValueError(f"calibrate: expected widths, as the model takes any {known.legal}, got none")
        widths = known.widths
    known.depths("calibrate", depth)
    ratios = sorted({known.check_ratio("calibrate", w) for w in widths}, reverse=True)
    if not ratios:
        raise ValueError("calibrate: expected at least one width, got none")
    norms = list(batch_norms(inner).values())
    if known.norm == "shared" and len(ratios) > 1:
        raise ValueError(
            f"calibrate: expected one width, as the batch norms share one set of statistics, got {len(ratios)}"
        )
    if not norms:
        raise ValueError("calibrate: expected a model with batch norms, got none; other norms need no calibration")
    device = next((p.device for p in inner.parameters()), None)
    with _restored(inner, norms):
        inner.eval()
        for norm in norms:
            norm.start_calibration(ratios)
        count = 0
        for batch in batches:
            args, kwargs = as_call(_to(_inputs(batch), device))
            for ratio in ratios:
                set_width(inner, ratio, depth)
                inner(*args, **kwargs)
            count += 1
        if count == 0:
            raise ValueError("calibrate: expected at least one batch, got none")


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _to(inputs: Any, device: torch.device | None) -> Any:
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) and device is not None else t, inputs)


@contextmanager
def _restored(model: nn.Module, norms: list) -> Iterator[None]:
    """Width, depth and training mode come back in any case, the statistics when something raises."""
    before = plan(model).current, plan(model).current_depth
    modes = [(module, module.training) for module in model.modules()]
    saved = [
        (module, {name: None if b is None else b.clone() for name, b in module._buffers.items()})
        for norm in norms
        for module in norm.modules()
    ]
    try:
        yield
    except BaseException:
        for module, buffers in saved:
            _put_back(module, buffers)
            if isinstance(module, CalibratedStatistics):
                module.read_back()
        raise
    finally:
        for norm in norms:
            norm.stop_calibration()
        for module, training in modes:
            module.training = training
        set_width(model, *before)


def _put_back(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    for name, old in buffers.items():
        current = module._buffers[name]
        if old is None or current is None or current.shape != old.shape:
            module._buffers[name] = old
        else:
            current.copy_(old)
