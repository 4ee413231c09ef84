"""Two processes of one gloo group on this machine."""

import socket

import torch
from torch import distributed, multiprocessing


def two_ranks(job, directory):
    """What ``job(rank, directory)`` gave on each of two ranks; ``job`` stands at the top of its module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_rank, args=(job, port, str(directory)), nprocs=2, start_method="spawn")
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]


def _rank(rank, job, port, directory):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.save(job(rank, directory), f"{directory}/rank{rank}.pt")
    finally:
        distributed.destroy_process_group()
