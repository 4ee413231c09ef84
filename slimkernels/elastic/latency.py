"""How long a sub-network takes on this machine, deployed."""

import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from slimkernels.elastic.deploy import deploy
from slimkernels.elastic.plan import Depth, Width
from slimkernels.elastic.trace import as_call

_NO_LIMIT = 2**62  # of the packed weights: they are dropped at once
_WARM, _RUNS, _SECONDS = 3, 15, 0.2


@torch.inference_mode()
def latency_ms(model: nn.Module, width: Width, depth: Depth, example_inputs: Any) -> float:
    """Median time of a forward of what ``deploy`` gives at a width and depth: at least 15 runs, and as many as take a
    fifth of a second."""
    net = deploy(model, widths=[(width, depth)], max_cache_bytes=_NO_LIMIT)
    args, kwargs = as_call(example_inputs)
    on_cuda = any(isinstance(t, torch.Tensor) and t.is_cuda for t in tree_leaves(example_inputs))
    times: list[float] = []
    for _ in range(_WARM):
        net(*args, **kwargs)
    while len(times) < _RUNS or sum(times) < _SECONDS:
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        net(*args, **kwargs)
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3
