"""What a trainer asks of its process group; without one it is the only rank."""

from typing import Any

import torch


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gather(value: Any, world_size: int) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    if world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
