"""Rung T1: Triton's interpreter, hardened, so that what passes here has its indexing, masks and bounds right.

``install()`` before any kernel is imported, in a process with ``TRITON_INTERPRET=1``. What it changes, each of which the
interpreter of Triton 3.6 to 3.9 gets wrong in silence:

1. bfloat16 arithmetic is done in float32 and rounded to nearest even (the interpreter adds the bits as integers).
2. float32 is rounded to bfloat16 (the interpreter truncates).
3. ``tl.dot`` rounds float32 operands to TF32 where the kernel asks for "tf32".
4. Lanes that a mask switches off hold NaN (integers: 0x5A..) when the load names no ``other``: undefined on a GPU.
5. Every address of an active lane lies in a tensor argument, or ``OutOfBounds``.
6. Programs run in a shuffled order, and ``Race`` is raised where their order matters.
7. ``tl.extra.libdevice`` functions have bodies in numpy.
8. A kernel that calls functions of its own is several times faster.

``LAUNCHES`` keeps what every launch moved; ``set_seed`` picks another order of programs.
"""

import functools
import os
from typing import Any

import numpy as np

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("tests.emulation.interpreter: expected TRITON_INTERPRET=1 to be set before Triton is imported")

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from tests.emulation.accesses import Launch, OutOfBounds, Race, spans_of
from tests.emulation.rounding import from_bfloat16, to_bfloat16, to_tf32

__all__ = ["LAUNCHES", "OutOfBounds", "Race", "install", "set_seed"]

LAUNCHES: list[Launch] = []

BUILDER = interpreter.InterpreterBuilder
FLOAT_OPS = (
    *("fadd", "fmul", "fsub", "fdiv", "frem", "fneg", "precise_divf", "approx_divf"),
    *("minimumf", "minnumf", "maximumf", "maxnumf", "clampf", "fma"),
    *("cos", "sin", "exp", "exp2", "floor", "ceil", "log", "log2", "sqrt", "precise_sqrt", "rsqrt", "erf"),
)


class State:
    """The launch that runs now; there is one at a time."""

    launch: Launch | None = None
    seed: int = 0
    order: np.ndarray = np.zeros(0, np.int64)


def install() -> None:
    """Harden the interpreter of this process; a second call does nothing."""
    if getattr(BUILDER, "_slimkernels_hardened", False):
        return
    BUILDER._slimkernels_hardened = True
    _mend_bfloat16()
    _mend_reductions()
    _mend_dot()
    _watch_memory()
    _watch_launches()
    _shuffle_programs()
    _call_without_patching()
    _give_libdevice_bodies()
    _let_tensors_be_indices()


def set_seed(seed: int) -> None:
    """Of the order in which the programs of the next launches run."""
    State.seed = seed


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _raised(value: Any) -> Any:
    return TensorHandle(from_bfloat16(value.data), tl.float32) if _is_bfloat16(value) else value


def _lowered(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_bfloat16(handle.data), tl.bfloat16)


def _mend_bfloat16() -> None:
    comparisons = [name.removeprefix("create_") for name in dir(BUILDER) if name.startswith("create_fcmp")]
    for name in [*FLOAT_OPS, *comparisons]:
        original = getattr(BUILDER, f"create_{name}", None)
        if original is not None:
            setattr(BUILDER, f"create_{name}", _through_float32(original))
    BUILDER.get_bf16 = lambda self, value: TensorHandle(to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    cast_impl, fp_to_fp = BUILDER.cast_impl, BUILDER.create_fp_to_fp

    def cast(self: Any, source: TensorHandle, to: Any) -> TensorHandle:
        if to.scalar == tl.bfloat16:
            if source.dtype.scalar == tl.bfloat16:
                return source
            return TensorHandle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        source = _raised(source)
        if source.dtype.scalar == to.scalar:
            return TensorHandle(source.data, to.scalar)
        with np.errstate(over="ignore"):  # float16 infinity is what a GPU gives too
            return cast_impl(self, source, to)

    def convert(self: Any, source: TensorHandle, to: Any, rounding: Any) -> TensorHandle:
        kinds = (source.dtype.scalar, to.scalar)
        if any(kind.primitive_bitwidth == 8 for kind in kinds):
            return fp_to_fp(self, source, to, rounding)
        return cast(self, source, to)

    BUILDER.cast_impl, BUILDER.create_fp_to_fp = cast, convert


def _through_float32(original: Any) -> Any:
    @functools.wraps(original)
    def op(self: Any, *args: Any, **kwargs: Any) -> TensorHandle:
        with np.errstate(all="ignore"):
            if not any(map(_is_bfloat16, args)):
                return original(self, *args, **kwargs)
            result = original(self, *map(_raised, args), **kwargs)
        return result if result.data.dtype == np.bool_ else _lowered(result)

    return op


def _mend_reductions() -> None:
    """Reductions and scans take the numpy data of tensors themselves, past the builder."""

    def through_float32(original: Any) -> Any:
        def apply(self: Any, given: Any) -> Any:
            tensors = given if isinstance(given, tuple) else (given,)
            low = [_is_bfloat16(t.handle) for t in tensors]
            if not any(low):
                return original(self, given)
            raised = tuple(_with(t, _raised(t.handle)) if is_low else t for t, is_low in zip(tensors, low, strict=True))
            result = original(self, raised if isinstance(given, tuple) else raised[0])
            results = result if isinstance(result, (tuple, list)) else (result,)
            lowered = tuple(
                _with(t, _lowered(t.handle)) if i < len(low) and low[i] and t.handle.data.dtype == np.float32 else t
                for i, t in enumerate(results)
            )
            return lowered if isinstance(result, (tuple, list)) else lowered[0]

        return apply

    for cls in (interpreter.ReduceOps, interpreter.ScanOps):
        name = "apply_impl" if "apply_impl" in vars(cls) else "apply"
        setattr(cls, name, through_float32(getattr(cls, name)))


def _with(t: Any, handle: TensorHandle) -> Any:
    """The tensor ``t`` of the language with other data of the same shape."""
    dtype = handle.dtype.scalar
    return tl.core.tensor(handle, tl.core.block_type(dtype, t.type.shape) if t.type.is_block() else dtype)


def _mend_dot() -> None:
    original = BUILDER.create_dot

    def dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *rest: Any) -> TensorHandle:
        named = str(precision).upper()
        if a.dtype.scalar == tl.float32 and "TF32" in named and "X3" not in named:
            a, b = (TensorHandle(to_tf32(operand.data), tl.float32) for operand in (a, b))
        result = original(self, _raised(a), _raised(b), _raised(d), precision, *rest)
        return _lowered(result) if _is_bfloat16(d) else result

    BUILDER.create_dot = dot


def _poison(shape: tuple[int, ...], dtype: Any) -> TensorHandle:
    kind = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        value = np.uint16(0x7FC0)
    elif kind.kind == "f":
        value = np.array(np.nan, kind)
    else:
        value = np.full(kind.itemsize, 0x5A, np.uint8).view(kind)[0] if kind != np.bool_ else np.bool_(True)
    return TensorHandle(np.full(shape, value, kind), dtype)


def _watch_memory() -> None:
    load, store = BUILDER.create_masked_load, BUILDER.create_masked_store
    update, exchange = BUILDER.create_atomic_rmw, BUILDER.create_atomic_cas

    def touch(kind: str, pointers: TensorHandle, mask: np.ndarray) -> None:
        if State.launch is not None:
            size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            State.launch.touch(kind, pointers.data, mask, size)

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> TensorHandle:
        touch("load", pointers, mask.data)
        other = _poison(pointers.data.shape, pointers.get_element_ty()) if other is None else other
        return load(self, pointers, mask, other, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        touch("store", pointers, mask.data)
        return store(self, pointers, value, mask, *rest, **options)

    def atomic_update(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> TensorHandle:
        if _is_bfloat16(value):
            raise NotImplementedError("atomics on bfloat16: not every target has them; accumulate in float32")
        touch("atomic", pointers, mask.data)
        return update(self, op, pointers, value, mask, *rest)

    def atomic_exchange(self: Any, pointers: Any, *rest: Any) -> TensorHandle:
        touch("atomic", pointers, np.ones(pointers.data.shape, bool))
        return exchange(self, pointers, *rest)

    BUILDER.create_masked_load, BUILDER.create_masked_store = masked_load, masked_store
    BUILDER.create_atomic_rmw, BUILDER.create_atomic_cas = atomic_update, atomic_exchange


def _watch_launches() -> None:
    executor = interpreter.GridExecutor
    call, prepare = executor.__call__, executor._init_args_hst

    def prepared(self: Any, args: Any, kwargs: Any) -> Any:
        result = prepare(self, args, kwargs)
        State.launch = Launch(self.fn.__name__, *spans_of([*result[0], *result[1].values()]))
        return result

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(self, *args, **kwargs)
            assert State.launch is not None
            LAUNCHES.append(State.launch)
            State.launch.check_races()
            State.launch.log.clear()
        finally:
            State.launch = None

    executor._init_args_hst, executor.__call__ = prepared, watched


def _shuffle_programs() -> None:
    set_dim, set_index = BUILDER.set_grid_dim, BUILDER.set_grid_idx

    def set_grid_dim(self: Any, *dims: int) -> None:
        set_dim(self, *dims)
        count = int(np.prod(dims))
        State.order = np.random.default_rng(State.seed).permutation(count)
        if State.launch is not None:
            State.launch.programs = count

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, size_y, size_z = self.grid_dim
        program = int(State.order[(x * size_y + y) * size_z + z])
        if State.launch is not None:
            State.launch.program = program
        set_index(self, program // (size_y * size_z), program // size_z % size_y, program % size_z)

    BUILDER.set_grid_dim, BUILDER.set_grid_idx = set_grid_dim, set_grid_idx


def _call_without_patching() -> None:
    """A kernel's call of another function puts wrappers around the whole language again, each time.

    The launch has done so for functions of ours, which know the language as ``tl``; for those of the language itself,
    which know it as ``core``, once is enough.
    """
    done: list[bool] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not done and not any(value is tl for value in self.fn.__globals__.values()):
            interpreter._patch_lang(self.fn)
            done.append(True)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


UNARY = {
    "abs": np.abs,
    "cos": np.cos,
    "erf": interpreter.np_erf_fp32,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fast_cosf": np.cos,
    "fast_expf": np.exp,
    "fast_sinf": np.sin,
    "log": np.log,
    "log1p": np.log1p,
    "rint": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}
BINARY = {"div_rn": np.divide, "fast_dividef": np.divide, "fmod": np.fmod, "pow": np.power}


def _give_libdevice_bodies() -> None:
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as cuda_libdevice

    def body(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            like = args[0]
            with np.errstate(all="ignore"):
                data = function(*(a.handle.data for a in args))
            handle = TensorHandle(data.astype(like.handle.data.dtype), like.handle.dtype.scalar)
            return tl.core.tensor(handle, like.type)

        return run

    for module in (libdevice, cuda_libdevice):
        for name, function in (UNARY | BINARY).items():
            if hasattr(module, name):
                setattr(module, name, body(function))


def _let_tensors_be_indices() -> None:
    """``range(0, K, BLOCK)`` over a run-time K: with numpy 2.4 the interpreter of Triton 3.6 raises TypeError."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr
        set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch
