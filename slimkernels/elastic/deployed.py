"""What ``deploy`` gives: a network traced once, its weights packed per width."""

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimkernels._copy import deep_copy
from slimkernels._extension import _C
from slimkernels.elastic.deploy_form import Form, make_form, only_used
from slimkernels.elastic.deploy_inner import deploy_inside, restore
from slimkernels.elastic.deploy_report import DeployReport, LayerReport, LayerTime
from slimkernels.elastic.deploy_segment import Misfit, make_segment
from slimkernels.elastic.deploy_trace import Traced, is_torch_layer, optional_arguments, trace
from slimkernels.elastic.extract import subnetwork
from slimkernels.elastic.plan import Depth, Width
from slimkernels.elastic.slices import number_side
from slimkernels.elastic.transform import batch_norms


class _Entry:
    """Everything of one width and depth: modules that PyTorch runs, and segments."""

    def __init__(
        self,
        root: nn.Module,
        form: Form | None,
        traced_as: Any,  # the blocks that are not there, and numbers in the graph that follow the width
        inner: "dict[str, _Inner]",  # what modules that cannot be traced call
        own_bytes: int,
    ) -> None:
        self.root, self.form, self.traced_as, self.inner, self.own_bytes = root, form, traced_as, inner, own_bytes

    @property
    def bytes(self) -> int:
        return self.own_bytes + sum(part.cache_bytes for part in self.inner.values())


class Deployed(nn.Module):
    """What ``deploy`` gives; call it as the model. Its width is its own and belongs to it, not to the thread: any number
    of threads may call it at once, as long as none sets the width meanwhile (and where parts are packed at their first call,
    after that one)."""

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
        self._forms: dict[Any, tuple[Traced, Form | None]] = {}
        self._apart: set[str] = set()  # nodes that PyTorch has to run
        self._optional = optional_arguments(model, method)
        self._positions = list(inspect.signature(getattr(model, method)).parameters)
        self._left_out = dict(self._optional)  # what the network was traced with
        self._active: tuple[Width, Depth, _Entry] | None = None
        self._norm = next(iter(batch_norms(model).values()), None)
        known = model.__dict__.get("_elastic")
        self._numbers = [(m, n) for m, side in (known.dims if known else ()) if (n := number_side(side)) is not None]
        self._watch()
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._optional:
            args, kwargs = self._given(args, kwargs)
        entry = self._current()
        if self._may_need_cast(args, kwargs):
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
        else:
            self._entries.move_to_end(key)
        self._active = (width, depth, entry)
        self._make_room()

    def _make_room(self) -> None:
        """The widths that were used least recently make way."""
        while self.cache_bytes > self.max_cache_bytes and len(self._entries) > 1:
            self._entries.popitem(last=False)
        self._check_size(self.cache_bytes, self.width)

    def _check_size(self, size: int, width: Width) -> None:
        if size > self.max_cache_bytes:
            raise ValueError(
                f"deploy: expected max_cache_bytes of at least {size}, what the weights at width {width} need,"
                f" got {self.max_cache_bytes}"
            )

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
        traced, form = self._forms[entry.traced_as]
        layers = []
        for i, segment in enumerate(() if form is None else form.segments):
            says = getattr(entry.root, f"_segment{i}").describe()
            for step, runs_on in zip(segment.steps, says, strict=True):
                layers.append(LayerReport(step.module or step.node, step.fused, i, runs_on))
        modules = [] if form is None else sorted(form.modules)
        others = [] if form is None else list(form.others)
        stopped = dict(traced.stopped)
        for name, part in entry.inner.items():
            if part.packed:
                found, first = part.report, len({layer.segment for layer in layers})
                for layer in found.layers:
                    layers.append(replace(layer, name=part.named(name, layer.name), segment=first + layer.segment))
                modules += [part.named(name, module) for module in found.modules]
                stopped |= {part.named(name, module): line for module, line in found.stopped.items()}
                others += found.others
        return DeployReport(
            layers=layers,
            modules=modules,
            others=others,
            stopped=stopped,
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

    def _subnetwork(self, width: Width, depth: Depth) -> tuple[nn.Module, Iterable[str]]:
        """A plain network of copies, and the blocks that it skips."""
        return subnetwork(self._model, width, depth)

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

    def _may_need_cast(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Tensors alone are looked at first: with cold caches the walk through what may be nested takes 70 us."""
        if kwargs or any(_other_dtype(a, self.dtype) for a in args):
            return True
        return self.dtype != torch.float32 and not all(isinstance(a, Tensor) for a in args)

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if _other_dtype(value, self.dtype) else value

    @torch.no_grad()
    def _pack(self, width: Width, depth: Depth) -> _Entry:
        root, skipped_blocks = self._subnetwork(width, depth)
        root.eval()
        traced_as = frozenset(skipped_blocks), tuple(getattr(root.get_submodule(m), n) for m, n in self._numbers)
        if traced_as not in self._forms:
            traced = trace(root, self.method, self._left_out)
            form = None if traced.graph is None else make_form(traced.graph, root, self._apart)
            self._forms[traced_as] = traced, form
        form = self._forms[traced_as][1]
        held: nn.Module = root
        if form is not None:
            held = only_used(root, form)
            for i, segment in enumerate(form.segments):
                setattr(held, f"_segment{i}", make_segment(segment, root, self.dtype, self.device, self.winograd))
        inner: dict[str, _Inner] = {}
        for name in (
            [""] if form is None else [name for name in self._forms[traced_as][0].stopped if name in form.modules]
        ):
            inner |= deploy_inside(held.get_submodule(name), name, lambda part: _Inner(part, self))
        held.to(self.dtype)
        size = self._bytes_of(held)
        size += sum(getattr(held, f"_segment{i}").bytes for i in range(len(form.segments))) if form is not None else 0
        self._check_size(size, width)
        return _Entry(held, form, traced_as, inner, size)

    def _bytes_of(self, held: nn.Module) -> int:
        tensors = {t.data_ptr(): t.nbytes for t in [*held.parameters(), *held.buffers()]}
        return sum(tensors.values())


class _Inner(Deployed):
    """What a module that cannot be traced calls, deployed by itself: a plain network of one width, packed at its first call
    and with the arguments of that call. It takes the place of the ``forward`` of ``part``."""

    _part: nn.Module
    _plain: nn.Module
    _outer: Deployed

    def __init__(self, part: nn.Module, outer: Deployed) -> None:
        # Weights are folded and packed first, then rounded to another dtype.
        copied = any(t.is_floating_point() and t.dtype != outer.dtype for t in part.parameters())
        plain = deep_copy(part) if copied else part
        alone = is_torch_layer(part)
        network = nn.Sequential(plain) if alone else plain
        super().__init__(network, outer.dtype, outer.device, outer.max_cache_bytes, "forward", outer.winograd)
        self.__dict__ |= {"_part": part, "_plain": plain, "_outer": outer}  # not submodules
        self._alone, self._copied = alone, copied

    @property
    def packed(self) -> bool:
        """Whether it was called."""
        return self._active is not None

    def named(self, name: str, inside: str) -> str:
        """Of something inside of this part, whose own name is ``name``."""
        return name if self._alone or not inside else f"{name}.{inside}"

    def _current(self) -> _Entry:
        if self._active is None:
            self.set_width(1.0)
        return super()._current()

    def _run(self, entry: _Entry, args: Any, kwargs: Any) -> Any:
        if entry.form is None or not (entry.form.segments or entry.inner):
            run: Any = type(self._plain).forward
            return run(self._plain, *args, **kwargs)
        return super()._run(entry, args, kwargs)

    def _pack(self, width: Width, depth: Depth) -> _Entry:
        restore(self._model, _Inner, self._part)
        entry = super()._pack(width, depth)
        if entry.form is not None and not entry.form.segments:
            self._plain.to(self.dtype)
        return entry

    def _subnetwork(self, width: Width, depth: Depth) -> tuple[nn.Module, Iterable[str]]:
        return self._model, ()

    def _make_room(self) -> None:
        self._outer._make_room()

    def _watch(self) -> None:
        pass  # the weights are those of a copy

    def _forget_if_changed(self) -> bool:
        return False

    def _bytes_of(self, held: nn.Module) -> int:
        return super()._bytes_of(self._model) if self._copied else 0  # else they are the outer one's


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
