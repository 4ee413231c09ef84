"""``deploy``: the inference form of an elastic model, its weights packed per width."""

from collections.abc import Iterable

import torch
from torch import nn

from slimkernels._extension import _C
from slimkernels.elastic.deployed import Deployed
from slimkernels.elastic.plan import Depth, Width, plan, unwrap


def deploy(
    model: nn.Module,
    *,
    widths: Iterable[Width | tuple[Width, Depth]] | None = None,
    dtype: torch.dtype | None = None,
    max_cache_bytes: int = 2**30,
    method: str = "forward",
    winograd: bool = True,
) -> Deployed:
    """An inference form of an elastic model: the same outputs as ``extract(model, width, depth)`` in eval mode, faster.

    The network is traced and rewritten once for all widths: batch norms are folded into the layers before them, and
    convolution or linear layer, residual addition and activation become one operation; on the CPU whole runs of these
    are one call into C++, with activations channels-last in memory that is kept between calls. Weights are packed per
    width (and depth) into a cache; ``set_width`` on a cached one is a look-up. What cannot be rewritten runs as PyTorch
    runs it; ``report`` says what each layer runs on. Where the forward cannot be traced, the report says which line stops
    it; the innermost module with that line runs its own code, and the modules that it calls are deployed each by itself, at
    their first call. Optional arguments are traced as given or left out in the
    last call: a call with others traces and packs anew.

    The model is not changed and its width not touched. When its parameters or statistics were written to since (a
    training step, a loaded state), the next call packs them anew. Hooks are not run in layers that are rewritten.

    Args:
        widths: pack these now, each a width or a pair (width, depth); the first becomes the one that runs. None: the
            model's current width, others on their first use.
        dtype: of weights and activations; inputs are cast to it. None: the model's. ``torch.bfloat16`` needs AVX512-BF16
            (with the C++ kernels) and sums in float32.
        max_cache_bytes: bound of the packed weights; those that were used least recently make way.
        winograd: let 3x3 convolutions of stride 1 run by Winograd's algorithm where that is faster: F(4x4, 3x3) in
            float32, where errors stay within twice PyTorch's and 1e-6 but are some times those of the direct kernels,
            F(2x2, 3x3) in bfloat16, and F(3x3, 3x3) where a norm is folded, within twice PyTorch's in a layer and
            about PyTorch's in a network. Packed weights of these layers take five times the bytes (bfloat16: 2.8, 3.8).
        method: what calling the result runs, another than ``forward`` (``stream`` of the audio models, say).

    Raises: ValueError when a width or depth is not legal, one width needs more than ``max_cache_bytes`` or there is no
        such method, TypeError for a dtype that is not floating point, RuntimeError when the machine has no bfloat16 products.
    Source: Yu and Huang, Universally Slimmable Networks (arXiv 1903.05134): one network, any width at run time; batch-norm
        folding: Jacob et al. (arXiv 1712.05877), section 3.2.
    """
    known = plan(model)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"deploy: expected dtype to be floating point, got {dtype}")
    if not isinstance(max_cache_bytes, int) or max_cache_bytes < 1:
        raise ValueError(f"deploy: expected max_cache_bytes of at least 1, got {max_cache_bytes}")
    inner = unwrap(model)
    parameter = next((p for p in inner.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if dtype is None:
        dtype = torch.float32 if parameter is None else parameter.dtype
    if dtype == torch.bfloat16 and device.type == "cpu" and _C is not None and not _C.deploy_has_bfloat16():
        raise RuntimeError("deploy: this machine has no bfloat16 products (AVX512-BF16); use dtype=torch.float32")
    if not callable(getattr(inner, method, None)):
        raise ValueError(f"deploy: expected the name of a method of {type(inner).__name__}, got {method!r}")
    made = Deployed(inner, dtype, device, max_cache_bytes, method, winograd)
    settings = [w if isinstance(w, tuple) else (w, None) for w in widths or ()]
    for width, depth in reversed(settings):
        made.set_width(width, depth)
    if not settings:
        made.set_width(known.current, known.current_depth)
    return made
