"""The checks that every op passes: see ``check_op``.

A *sample* is ``(args, kwargs)`` of the public function in float32 on the CPU. The *oracle* is the same computation written
with plain PyTorch calls: it never goes through slimkernels.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

# With SLIMKERNELS_TEST_DEVICE=cuda every tensor that a test makes is on the GPU (tests/conftest.py), unless it says "cpu".
DEVICE = os.environ.get("SLIMKERNELS_TEST_DEVICE", "cpu")
# There float32 is multiplied exactly, or in tf32 where SLIMKERNELS_TEST_TF32=1.
TF32 = os.environ.get("SLIMKERNELS_TEST_TF32") == "1"
DEVICES = [DEVICE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_IDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
ODD_SIZES = [1, 3, 5, 7, 9, 13, 17, 31, 33, 65, 72, 100, 129]
# tf32 keeps as many bits as float16.
FLOOR = {torch.float32: 1e-3 if TF32 else 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}


def dtype_id(value: Any) -> str | None:
    return DTYPE_IDS.get(value) if isinstance(value, torch.dtype) else None


def error(actual: Tensor, expected: Tensor) -> float:
    """norm(actual - expected) / norm(expected) in float64; a NaN or a wrong shape is never small."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double().cpu(), expected.double().cpu()
    if expected.numel() == 0:
        return 0.0
    assert not actual.isnan().any() or expected.isnan().any(), "NaN in the result"
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, fn) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, fn) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)
    return found


def cast_like(t: Tensor, dtype: torch.dtype, device: str = DEVICE) -> Tensor:
    """A copy in ``dtype`` with the same strides (also for slices, transposes and expanded views), requiring grad if floating."""
    if not t.is_floating_point():
        return t.clone() if t.device.type == "cpu" else t.clone().to(device)  # batch sizes stay on the CPU
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    storage = torch.full((max(extent, 1),), 7.7, dtype=dtype, device=device)
    out = storage.as_strided(t.shape, t.stride())
    if t.numel():
        expanded = [stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)]
        index = tuple(slice(0, 1) if e else slice(None) for e in expanded)
        out[index].copy_(t[index])
    return out.requires_grad_(t.requires_grad or t.is_floating_point())


def run_with_grads(fn: Callable, args: tuple, kwargs: dict, seed: int = 1) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and the gradient of every floating-point input that requires it, for a random output gradient."""
    leaves = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
    outputs = [t for t in tensors_in((fn(*args, **kwargs),)) if t.is_floating_point()]
    generator = torch.Generator("cpu").manual_seed(seed)
    dys = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu").to(o.dtype).to(o.device)
        for o in outputs
    ]
    active = [(o, dy) for o, dy in zip(outputs, dys, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in active], leaves, [dy for _, dy in active], allow_unused=True)
    return [o.detach() for o in outputs], list(grads)


def check_as_good_as_pytorch(
    op: Callable, oracle: Callable, args: tuple, kwargs: dict, dtype: torch.dtype, device: str = DEVICE
) -> None:
    """Output and every gradient: error against float64 at most twice that of PyTorch in the same dtype, plus a floor."""

    def prepared(to: torch.dtype, on: str = device) -> tuple[tuple, dict]:
        # Rounded to `dtype` first, so that the float64 run sees the very same numbers.
        return map_tensors(
            (args, kwargs),
            lambda t: cast_like(t.detach().to(dtype) if t.is_floating_point() else t, to, on).requires_grad_(
                t.is_floating_point() and not getattr(t, "no_grad", False)
            ),
        )

    ours_args, ours_kwargs = prepared(dtype)
    before = map_tensors((ours_args, ours_kwargs), lambda t: t.detach().clone())
    ours, our_grads = run_with_grads(op, ours_args, ours_kwargs)
    with torch.device("cpu"):
        exact, exact_grads = run_with_grads(oracle, *prepared(torch.float64, "cpu"))
    torchs, torch_grads = run_with_grads(oracle, *prepared(dtype))
    for actual, changed in zip(tensors_in(before), tensors_in((ours_args, ours_kwargs)), strict=True):
        assert torch.equal(actual, changed.detach()), "an input was changed"
    assert len(ours) == len(exact)
    for i, (o, e, t) in enumerate(zip(ours, exact, torchs, strict=True)):
        assert o.dtype == t.dtype, f"output {i} has dtype {o.dtype}, PyTorch's {t.dtype}"
        assert error(o, e) <= 2 * error(t, e) + FLOOR[dtype], f"output {i}: {error(o, e)} vs PyTorch's {error(t, e)}"
    for i, (o, e, t) in enumerate(zip(our_grads, exact_grads, torch_grads, strict=True)):
        assert (o is None) == (e is None), f"gradient {i} is {'missing' if o is None else 'unexpected'}"
        if o is not None:
            limit = 2 * error(t, e) + FLOOR[dtype]
            assert error(o, e) <= limit, f"gradient {i}: {error(o, e)} vs PyTorch's {error(t, e)}"


def check_gradients(op: Callable, args: tuple, kwargs: dict) -> None:
    """gradcheck in float64 (keep the sample small)."""
    args, kwargs = map_tensors((args, kwargs), lambda t: cast_like(t.detach(), torch.float64))
    assert torch.autograd.gradcheck(lambda *a: op(*a, **kwargs), args, nondet_tol=0.0)


def check_graphs(
    call: Callable[..., Tensor], inputs: Iterable[tuple], max_graphs: int = 3, backend: str = "aot_eager"
) -> None:
    """``call(*input)`` compiled once, run on every input: at most ``max_graphs`` graphs, results and gradients equal eager."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for item in inputs:
        expected, expected_grads = run_with_grads(call, item, {})
        actual, actual_grads = run_with_grads(compiled, item, {})
        for a, e in zip([*actual, *actual_grads], [*expected, *expected_grads], strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                assert error(a, e) <= 1e-6
    assert counter.frame_count <= max_graphs, f"{counter.frame_count} graphs"


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other memory layouts: a slice of a larger tensor, transposed storage, channels-last, expanded."""
    yield "contiguous", t.contiguous()
    if t.dim() == 0 or t.numel() == 0:
        return
    padded = torch.full([size + 3 for size in t.shape], 7.7, dtype=t.dtype, device=t.device)
    view = padded[tuple(slice(0, size) for size in t.shape)]
    view.copy_(t)
    yield "sliced", view
    if t.dim() >= 2:
        yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
        expanded = t[:1].expand(t.shape)
        yield "expanded", expanded
    if t.dim() == 4:
        yield "channels_last", t.contiguous(memory_format=torch.channels_last)
    if t.dim() == 5:
        yield "channels_last_3d", t.contiguous(memory_format=torch.channels_last_3d)


def same_module(module: torch.nn.Module) -> torch.nn.Module:
    """A deep copy with the same parameters, for comparing a run that changes state."""
    return copy.deepcopy(module)
