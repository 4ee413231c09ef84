"""``deploy``: the inference form of an elastic model, its weights packed per width."""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimkernels._extension import _C
from slimkernels.elastic.deploy_form import Form, make_form
from slimkernels.elastic.deploy_report import DeployReport, LayerReport, LayerTime
from slimkernels.elastic.deploy_segment import Misfit, make_segment
from slimkernels.elastic.deploy_trace import Traced, optional_arguments, trace
from slimkernels.elastic.extract import subnetwork
from slimkernels.elastic.plan import Depth, Width, plan, unwrap
from slimkernels.elastic.transform import batch_norms


def deploy(
    model: nn.Module,
    *,
    widths: Iterable[Width | tuple[Width, Depth]] | None = None,
    dtype: torch.dtype | None = None,
    max_cache_bytes: int = 2**30,
    method: str = "forward",
    winograd: bool = True,
) -> "Deployed":
    """An inference form of an elastic model: the same outputs as ``extract(model, width, depth)`` in eval mode, faster.

    The network is traced and rewritten once for all widths: batch norms are folded into the layers before them, and
    convolution or linear layer, residual addition and activation become one operation; on the CPU whole runs of these
    are one call into C++, with activations channels-last in memory that is kept between calls. Weights are packed per
    width (and depth) into a cache; ``set_width`` on a cached one is a look-up. What cannot be rewritten runs as PyTorch
    runs it; ``report`` says what each layer runs on. Where the forward cannot be traced, the report says which line stops
    it, and the innermost module with that line runs as it is. Optional arguments are traced as given or left out in the
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
            F(2x2, 3x3) in bfloat16, within PyTorch's. Packed weights of these layers take five (bfloat16: 2.8) times the
            bytes.
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


class _Entry:
    """Everything of one width and depth: modules that PyTorch runs, and segments."""

    def __init__(self, root: nn.Module, form: Form | None, skipped: frozenset[str], bytes_: int) -> None:
        self.root, self.form, self.skipped, self.bytes = root, form, skipped, bytes_


class Deployed(nn.Module):
    """What ``deploy`` gives; call it as the model. Its width is its own and belongs to it, not to the thread: any number
    of threads may call it at once, as long as none sets the width meanwhile."""

    _model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        max_cache_bytes: int,
        method: str,
        winograd: bool,
    ) -> None:
        super().__init__()
        self.__dict__["_model"] = model  # not a submodule: its parameters are not this module's
        self.dtype, self.device, self.max_cache_bytes, self.method = dtype, device, max_cache_bytes, method
        self.winograd = winograd
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._forms: dict[frozenset[str], tuple[Traced, Form | None]] = {}
        self._apart: set[str] = set()  # nodes that PyTorch has to run
        self._optional = optional_arguments(model, method)
        self._positions = list(inspect.signature(getattr(model, method)).parameters)
        self._left_out = dict(self._optional)  # what the network was traced with
        self._active: tuple[Width, Depth, _Entry] | None = None
        self._norm = next(iter(batch_norms(model).values()), None)
        self._watch()
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._optional:
            args, kwargs = self._given(args, kwargs)
        entry = self._current()
        if self.dtype != torch.float32 or any(_other_dtype(a, self.dtype) for a in args) or kwargs:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        with torch.no_grad():
            try:
                return self._run(entry, args, kwargs)
            except Misfit as error:
                return self._run_apart({error.node}, args, kwargs)

    def _given(self, args: Any, kwargs: Any) -> tuple[tuple, dict[str, Any]]:
        """The arguments without those that are as if left out; the network is traced anew for others than last time."""
        given = dict(zip(self._positions, args, strict=False)) | kwargs
        left_out = {name: d for name, d in self._optional.items() if name not in given or given[name] is d}
        if left_out.keys() != self._left_out.keys():
            self._left_out = left_out
            self.clear()
        if len(args) > len(self._positions):  # *args
            return args, kwargs
        return (), {name: value for name, value in given.items() if name not in left_out}

    def _run(self, entry: _Entry, args: Any, kwargs: Any) -> Any:
        if entry.form is None:
            return getattr(entry.root, self.method)(*args, **kwargs)
        return entry.form.run(entry.root, *args, **kwargs)

    def _run_apart(self, nodes: set[str], args: Any, kwargs: Any) -> Any:
        """Leave nodes that don't fit the shapes of their inputs to PyTorch; when it can't run them either, the inputs are
        wrong and nothing changes."""
        before = set(self._apart)
        while True:
            self._apart |= nodes
            self.clear()
            try:
                return self._run(self._current(), args, kwargs)
            except Misfit as error:
                nodes = {error.node}
            except Exception:
                self._apart = before
                self.clear()
                raise

    def set_width(self, width: Width, depth: Depth = None) -> None:
        """Run at ``width`` and ``depth`` from now on, as in ``elastic.set_width``; packs the weights on first use.

        Raises: ValueError when the width or depth is not a legal one, or its weights need more than ``max_cache_bytes``.
        """
        self._forget_if_changed()
        key = _key(width, depth)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._pack(width, depth)
            while self.cache_bytes > self.max_cache_bytes:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(key)
        self._active = (width, depth, entry)

    @property
    def width(self) -> Width:
        """The width in use."""
        assert self._active is not None
        return self._active[0]

    @property
    def depth(self) -> Depth:
        """The depth in use."""
        assert self._active is not None
        return self._active[1]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(entry.bytes for entry in self._entries.values())

    @property
    def cached(self) -> list[tuple[Width, Depth]]:
        """The widths and depths that are packed, least recently used first."""
        return [
            (dict(w) if isinstance(w, tuple) else w, dict(d) if isinstance(d, tuple) else d) for w, d in self._entries
        ]

    @property
    def report(self) -> DeployReport:
        """What each layer of the current width runs on; tiles are those for the shapes of the last call."""
        entry = self._current()
        traced, form = self._forms[entry.skipped]
        layers = []
        for i, segment in enumerate(() if form is None else form.segments):
            says = getattr(entry.root, f"_segment{i}").describe()
            for step, runs_on in zip(segment.steps, says, strict=True):
                layers.append(LayerReport(step.module or step.node, step.fused, i, runs_on))
        return DeployReport(
            layers=layers,
            modules=[] if form is None else sorted(form.modules),
            others=[] if form is None else form.others,
            stopped=dict(traced.stopped),
            dtype=str(self.dtype).removeprefix("torch."),
            cached={str(key): e.bytes for key, e in zip(self.cached, self._entries.values(), strict=True)},
            cache_bytes=self.cache_bytes,
            max_cache_bytes=self.max_cache_bytes,
        )

    def profile(self, *args: Tensor, repeats: int = 20) -> list[LayerTime]:
        """Median time of every operation of the segments, in the order they run, for these inputs.

        Raises: RuntimeError where the segments do not run in C++.
        """
        self(*args)
        entry, found, given = self._current(), list[LayerTime](), dict[str, tuple[Tensor, ...]]()
        segments = [] if entry.form is None else [f"_segment{i}" for i in range(len(entry.form.segments))]
        hooks = [
            entry.root.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: given.__setitem__(name, inputs)
            )
            for name in segments
        ]
        self(*args)
        for hook in hooks:
            hook.remove()
        for name in segments:
            found += entry.root.get_submodule(name).times(given[name], repeats)  # type: ignore[operator]
        return found

    def clear(self) -> None:
        """Forget all packed weights, and how the network was traced."""
        self._entries.clear()
        self._forms.clear()
        self._watch()

    def train(self, mode: bool = True) -> "Deployed":
        """Stays in eval mode: this form is for inference only."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"width={self.width}, dtype={self.dtype}, {len(self._entries)} widths packed, {self.cache_bytes} bytes"

    # What follows keeps the packed weights in step with the model.

    def _watch(self) -> None:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._watched = _C.DeployWatch(tensors) if _C is not None else _Watch(tensors)
        self._statistics = self._ratios()

    def _ratios(self) -> Any:
        """The tensor that calibrating another width replaces."""
        calibrated = None if self._norm is None else self._norm._modules.get("calibrated")
        return None if calibrated is None else calibrated._buffers["ratios"]

    def _forget_if_changed(self) -> bool:
        if not self._watched.changed() and self._ratios() is self._statistics:
            return False
        self._entries.clear()
        self._watch()
        return True

    def _current(self) -> _Entry:
        assert self._active is not None
        width, depth, entry = self._active
        if self._forget_if_changed() or not self._entries:
            self.set_width(width, depth)
            entry = self._active[2]
        return entry

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if _other_dtype(value, self.dtype) else value

    @torch.no_grad()
    def _pack(self, width: Width, depth: Depth) -> _Entry:
        root, skipped_blocks = subnetwork(self._model, width, depth)
        root.eval()
        skipped = frozenset(skipped_blocks)
        if skipped not in self._forms:
            traced = trace(root, self.method, self._left_out)
            form = None if traced.graph is None else make_form(traced.graph, root, self._apart)
            self._forms[skipped] = traced, form
        form = self._forms[skipped][1]
        held: nn.Module = root
        if form is not None:
            held = _only(root, form)
            for i, segment in enumerate(form.segments):
                setattr(held, f"_segment{i}", make_segment(segment, root, self.dtype, self.device, self.winograd))
        held.to(self.dtype)
        tensors = {t.data_ptr(): t.nbytes for t in [*held.parameters(), *held.buffers()]}
        size = sum(tensors.values())
        size += sum(getattr(held, f"_segment{i}").bytes for i in range(len(form.segments))) if form is not None else 0
        if size > self.max_cache_bytes:
            raise ValueError(
                f"deploy: expected max_cache_bytes of at least {size}, what the weights at width {width} need,"
                f" got {self.max_cache_bytes}"
            )
        return _Entry(held, form, skipped, size)


def _only(root: nn.Module, form: Form) -> nn.Module:
    """A tree with the modules and tensors that PyTorch still runs, under their names."""
    held = nn.Module()
    for name in [*form.modules, *form.attributes]:
        *path, last = name.split(".")
        source, target = root, held
        for part in path:
            source = source.get_submodule(part)
            if part not in target._modules:
                target.add_module(part, nn.Module())
            target = target.get_submodule(part)
        if last in source._modules:
            target._modules[last] = source._modules[last]
        elif last in source._parameters:
            target._parameters[last] = source._parameters[last]
        elif last in source._buffers:
            target._buffers[last] = source._buffers[last]
        else:
            setattr(target, last, getattr(source, last))
    return held


def _key(width: Width, depth: Depth) -> Any:
    wide = tuple(width.items()) if isinstance(width, Mapping) else width
    deep = tuple(depth.items()) if isinstance(depth, Mapping) else depth
    return wide, deep


def _other_dtype(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype


class _Watch:
    """Says whether one of the tensors was written to or given other memory since it was asked last."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.seen = self._stamp()

    def _stamp(self) -> list[tuple[int, int]]:
        return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in self.tensors]

    def changed(self) -> bool:
        now = self._stamp()
        differs, self.seen = now != self.seen, now
        return differs
