"""Small things that the step, the evaluation and the loop share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile made this module, or one that DistributedDataParallel holds."""
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
        return is_compiled(model.module)
    return isinstance(model, torch._dynamo.OptimizedModule)


def without_reduction(model: nn.Module) -> AbstractContextManager:
    """Inside it backward accumulates gradients without reducing them over the ranks; nothing for other modules."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def autocast(model: nn.Module, amp: str | None) -> AbstractContextManager:
    """Mixed precision on the model's device; None leaves the caller's own setting alone.

    Raises: ValueError when ``amp`` is none of bf16, fp16 and None.
    """
    if amp is None:
        return nullcontext()
    if amp not in AMP:
        raise ValueError(f"train: expected amp to be one of {tuple(AMP)} or None, got {amp!r}")
    return torch.autocast(device_of(model).type, AMP[amp])


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a batch.

    Raises: ValueError when the batch is not a pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"train: expected a batch (inputs, targets), got a {type(batch).__name__}{size}")
    return batch[0], batch[1]


def call(model: nn.Module, inputs: Any) -> Any:
    """Runs the model on a tensor, the members of a tuple or list, or the items of a dict as keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``fn`` on every tensor inside tuples, named tuples, lists and dicts; anything else is kept."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, fn) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, fn) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, fn) for key, item in value.items()}
    return value


def move(batch: Any, device: torch.device) -> Any:
    return map_tensors(batch, lambda t: t.to(device, non_blocking=True))


def batch_size(inputs: Any) -> int:
    """First dimension of the first tensor inside."""
    sizes: list[int] = []

    def note(t: Tensor) -> Tensor:
        sizes.append(t.shape[0] if t.dim() else 1)
        return t

    map_tensors(inputs, note)
    return sizes[0] if sizes else 1


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode is restored on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
