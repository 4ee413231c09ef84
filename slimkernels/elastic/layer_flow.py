"""Follows channels through a run of a model: what its layers take in and put out, and all operations between them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from slimkernels.elastic.absent import Places, Spots
from slimkernels.elastic.attention import ATTENTION, called_with, inference_path_off, out_proj_of
from slimkernels.elastic.coupling import IS_OUTPUT, SINGLE, Coupling
from slimkernels.elastic.flow import Follower
from slimkernels.elastic.labels import FIXED, Labels, varying
from slimkernels.elastic.layers import CONVS, RECURRENT, full_size, kind_of
from slimkernels.elastic.recurrent import as_states, given_states, state_sides


class _Layers:
    """Stands between the layers that are sliced and what calls them."""

    def __init__(
        self, model: nn.Module, coupling: Coupling, reasons: Mapping[str, str | None], plain: Mapping, heads: str
    ) -> None:
        self.coupling, self.labels = coupling, Labels()
        self.places, self.spots = Places(model), Spots(coupling)
        self.follower = Follower(self.labels, coupling, self.places, self.spots, self._poison, self._used, heads)
        self.poisoned: set[int] = set()
        self.owners: dict[int, list[str]] = {}  # storage -> layers whose weights it holds, which have a forward
        self.followed: dict[str, Any] = {}
        self.parameters: dict[int, list[tuple[str, str]]] = {}  # storage -> plain parameters
        for name, module in model.named_modules():
            sliced = kind_of(module) is not None and reasons[name] is None
            if sliced:
                self.followed[name] = module
                self.spots.layers.append(name)
            reason = reasons[name] or ("its weights are used outside of it" if sliced else None)
            label = self.labels.fixed(FIXED if reason is None else f"coupled to {name}: {reason}" if name else reason)
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or (f"{name}.{key}" if name else key) in plain:
                    continue
                if self.labels.get(tensor) is None:
                    self.labels.put(tensor, torch.tensor(label, dtype=torch.int32))
                if sliced:
                    self.owners.setdefault(tensor.untyped_storage()._cdata, []).append(name)
        for name, (p, axis) in plain.items():
            owner, _, key = name.rpartition(".")
            side = (owner, f"param:{axis}:{key}")
            self.parameters.setdefault(p.untyped_storage()._cdata, []).append(side)
            nodes = self.nodes(*side)
            shape = [1] * p.dim()
            shape[axis] = len(nodes)
            known = self.labels.get(p)
            if known is not None:  # one parameter with two names
                self.follower.unify(known, nodes.view(shape))
            else:
                self.labels.put(p, nodes.view(shape))

    def nodes(self, name: str, side: str) -> Tensor:
        """Labels of the positions of one side."""
        start, size = self.coupling.offsets[name, side]
        return torch.arange(start + 1, start + 1 + size, dtype=torch.int32)

    def _poison(self, node: int, reason: str) -> None:
        if node not in self.poisoned:
            self.poisoned.add(node)
            self.coupling.poison.append((node, reason))

    def _used(self, t: Tensor) -> None:
        """A tensor is an argument of an operation outside of the layers."""
        if t.layout != torch.strided:
            return
        key = t.untyped_storage()._cdata
        for name in self.owners.pop(key, ()):
            kind = kind_of(self.followed[name])
            for side in kind.sides if kind else ():
                self.coupling.poison_all((name, side), f"coupled to {name}: its weights are used outside of it")
        self.coupling.known.update(self.parameters.pop(key, ()))

    def taken(self, x: Tensor, name: str, side: str, dim: int = -1) -> bool:
        """A layer takes channels in. False when they lie in another dimension than the one that it works on."""
        labels = self.labels.get(x)
        if labels is None or x.numel() == 0:
            return True
        rows = varying(labels.movedim(dim, -1))
        if rows.shape[-1] == 1 and rows.numel() > 1 and bool((rows > 0).any()):
            return False
        rows = rows.reshape(-1, rows.shape[-1]).unique(dim=0)
        nodes = self.nodes(name, side)
        for row in rows:
            self.follower.unify(torch.where(row > 0, row, torch.zeros((), dtype=row.dtype)), nodes)
        return True

    def put_out(self, y: Tensor, name: str, side: str, dim: int = -1) -> None:
        """A layer puts channels out. A single one cannot be taken apart."""
        nodes = self.nodes(name, side)
        if len(nodes) == 1:
            self._poison(int(nodes) - 1, SINGLE)
            nodes = torch.tensor([self.labels.fixed(FIXED)], dtype=torch.int32)
        shape = [1] * y.dim()
        shape[dim] = len(nodes)
        self.labels.put(y, nodes.view(shape))

    def follow(self, name: str, module: Any, args: tuple, kwargs: dict, y: Any) -> None:
        """What a call of a layer couples."""
        kind = kind_of(module)
        assert kind is not None
        self.coupling.known.update((name, side) for side in kind.sides)
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, RECURRENT):
            self._follow_recurrent(name, module, x, given_states(args, kwargs), y)
        elif isinstance(module, ATTENTION):
            self._follow_attention(name, called_with(args, kwargs), y)
        elif "ch" in kind.sides:
            if full_size(module, kind, "ch") == 1 and isinstance(module, nn.PReLU):
                self.labels.put(y, self.labels.get(x))
                return
            last = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
            dim = -1 if last or x.dim() == 1 else 1
            if isinstance(module, nn.modules.instancenorm._InstanceNorm) and x.dim() == module._get_no_batch_dim():
                dim = 0
            self.taken(x, name, "ch", dim)
            self.labels.put(y, self.labels.get(x))
        else:
            dim = y.dim() - len(module.kernel_size) - 1 if isinstance(module, CONVS) else -1
            if "in" in kind.sides and not self.taken(x, name, "in", dim):
                self._pass_by(name, x, y, dim)
            else:
                self.put_out(y, name, "out", dim)

    def _pass_by(self, name: str, x: Tensor, y: Tensor, dim: int) -> None:
        """The layer works on positions or steps: the channels are in what it puts out as they are in what it takes in."""
        self.coupling.poison_all((name, "out"), "it works on another dimension than that of the channels")
        labels = varying(self.labels.get(x))  # type: ignore[arg-type]
        others = [d for d in range(x.dim()) if labels.shape[d] > 1]
        if any(x.shape[d] != y.shape[d] or d > dim % x.dim() for d in others):
            self.follower.spoil(labels, f"{name} works across its channels")
        self.labels.put(y, labels if all(x.shape[d] == y.shape[d] for d in others) else None)

    def _follow_recurrent(self, name: str, module: Any, x: Any, hx: Any, y: Any) -> None:
        data = x.data if isinstance(x, PackedSequence) else x
        if not self.taken(data, name, "in"):
            self.follower.spoil(self.labels.get(data), f"{name} works on another dimension than that of its channels")
        sides = state_sides(module)
        for state, side in zip(as_states(hx), sides, strict=False):
            self.taken(state, name, side)
        if isinstance(module, nn.RNNCellBase):
            states = y
        else:
            out, states = y
            self.put_out(out.data if isinstance(out, PackedSequence) else out, name, "out")
        for state, side in zip(as_states(states), sides, strict=False):
            self.put_out(state, name, side)

    def _follow_attention(self, name: str, call: dict[str, Any], y: tuple[Tensor, Tensor | None]) -> None:
        for argument, side in (("query", "in"), ("key", "key"), ("value", "value")):
            if not self.taken(call[argument], name, side):
                labels = self.labels.get(call[argument])
                self.follower.spoil(labels, f"{name} works on another dimension than that of its channels")
        for mask in (call.get("attn_mask"), call.get("key_padding_mask")):
            if mask is not None:
                self.follower.spoil(self.labels.get(mask), f"its channels are a mask of {name}")
        out, weights = y
        ends = out_proj_of(name)
        self.coupling.known.update((ends, side) for side in ("in", "out"))
        self.put_out(out, ends, "out")
        if weights is not None:
            self.labels.put(weights, None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        try:
            for name, module in self.followed.items():
                module.__dict__["forward"] = self._listener(name, module, module.forward)
            yield
        finally:
            for module in self.followed.values():
                module.__dict__.pop("forward", None)

    def _listener(self, name: str, module: Any, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                y = forward(*args, **kwargs)
                self.follow(name, module, args, kwargs, y)
            return y

        return call


class NoOutput(Exception):
    """The model returned no tensor that could be compared."""


class FollowError(Exception):
    """The model does not run."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def follow(
    model: nn.Module,
    call: Callable[[], list[Tensor]],  # runs the model and gives its outputs
    given: list[Tensor],  # inputs
    coupling: Coupling,
    reasons: Mapping[str, str | None],  # of modules that are not to be sliced
    plain: Mapping[str, Any],  # plain parameters and the axis of their channels
    heads: str,  # see ``Products``
) -> Spots:
    """Couple what a run of the model couples. Layers without a reason against it are taken as a whole; everything else is
    followed operation by operation."""
    layers = _Layers(model, coupling, reasons, plain, heads)
    for t in given:
        if layers.labels.get(t) is None:
            layers.labels.put(t, torch.tensor(layers.labels.fixed(FIXED), dtype=torch.int32))
    try:
        with inference_path_off(), layers.listening(), torch.no_grad(), layers.places.followed(), layers.follower:
            outputs = call()
    except Exception as error:
        raise FollowError(error) from error
    if not outputs:
        raise NoOutput(f"none from {type(model).__name__}")
    for y in outputs:
        layers.follower.spoil(layers.labels.get(y), IS_OUTPUT)
    return layers.spots
