"""Follows channels through the operations of a run, whatever they are.

Views need no rule (see ``labels.py``). An operation that moves elements is done to the labels too; one that works element by
element couples what meets; a matrix product couples what it sums over. An operation that is not known, and changes a
dimension in which channels lie, leaves them as they are in the full network. What follows from this is tried out before
it is believed (``probe.py``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimkernels.elastic.absent import Place, Places, Spots
from slimkernels.elastic.coupling import Coupling
from slimkernels.elastic.labels import FIXED, Labels, varying
from slimkernels.elastic.products import ANOTHER, Products

# Operations whose result holds elements of their floating-point arguments, moved about.
MOVES = {
    *("index", "index_select", "gather", "roll", "flip", "repeat", "embedding", "pixel_shuffle", "pixel_unshuffle"),
    *(
        "channel_shuffle",
        "native_channel_shuffle",
        "im2col",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
    ),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "index_put", "scatter", "select_scatter"),
    *(
        "slice_scatter",
        "diagonal_scatter",
        "index_copy",
        "_reshape_copy",
        "_unsafe_index",
        "rot90",
        "repeat_interleave",
    ),
    *("_index_put_impl", "tril", "triu", "view_copy", "unfold_copy", "permute_copy", "as_strided_copy", "take"),
}
NEW = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
NEW |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"}
KEEP = {"fill", "zero", "normal", "uniform", "bernoulli", "random"}  # written over in place: the channels stay


class Follower(Products, TorchDispatchMode):
    """Couples channels while a model runs. ``poison(node, reason)`` is told of those that have to stay, ``used(tensor)`` of every
    argument of an operation."""

    def __init__(
        self, labels: Labels, coupling: Coupling, places: Places, spots: Spots, poison: Any, used: Any, heads: str
    ) -> None:
        super().__init__()
        self.labels, self.coupling, self.poison, self.used = labels, coupling, poison, used
        self.places, self.spots, self.heads = places, spots, heads
        self.at: Place = "", "", 0  # the operation that runs

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.at = self.places.next(func)
        out = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for t in given:
            self.used(t)
        name = func.overloadpacket.__name__
        mutates = func._schema.is_mutable
        name = name.removesuffix("_") if mutates else name
        storages = {t.untyped_storage()._cdata for t in given}
        if made and not mutates and all(t.untyped_storage()._cdata in storages for t in made):
            return out  # views
        if name in NEW or (mutates and name in KEEP):
            return out
        try:
            for t, labels in zip(made, self._result(func, name, args, kwargs, given, made), strict=False):
                self.labels.put(t, labels)
        except (RuntimeError, TypeError, ValueError, IndexError):  # the model ran: it is the rule that fails
            for t in given:
                self.spoil(self.labels.get(t), f"its channels reach a form of {func} that is not followed")
            for t in made:
                self.labels.put(t, self._fixed())
        return out

    # Rules: the labels of what an operation made.

    def _result(
        self, func: Any, name: str, args: Sequence, kwargs: Any, given: list[Tensor], made: list[Tensor]
    ) -> Sequence[Tensor | None]:
        if not any(self.labels.get(t) is not None for t in given):
            return [None] * len(made)
        if name == "copy":
            return [self.labels.get(args[1])]
        if name in ("cat", "stack"):
            return [self._joined(name, list(args[0]), args[1] if len(args) > 1 else kwargs.get("dim", 0))]
        if name == "constant_pad_nd":
            return [self._padded(args[0], args[1])]
        if name in MOVES:
            return [self._moved(func, args, kwargs)]
        rule = getattr(self, f"_op_{name.lstrip('_')}", None)
        if rule is not None:
            return rule(made, *args)
        if name.startswith("_scaled_dot_product"):
            return [self._attention(made[0], *args[:3])]
        if torch.Tag.pointwise in func.tags:
            return [self._pointwise(given)] * len(made)
        arguments = {a.name: i for i, a in enumerate(func._schema.arguments)}
        if "dim" in arguments and "keepdim" in arguments:
            at = arguments["dim"]
            dims = args[at] if len(args) > at else kwargs.get("dim")
            keep = args[arguments["keepdim"]] if len(args) > arguments["keepdim"] else kwargs.get("keepdim", False)
            return [self._reduced(given[0], dims, bool(keep))] * len(made)
        return [self._other(func, t, given) for t in made]

    def _moved(self, func: Any, args: Sequence, kwargs: Any) -> Tensor:
        def of(t: Any, first: bool) -> Any:
            if not isinstance(t, Tensor):
                return [of(part, False) for part in t] if isinstance(t, (list, tuple)) else t
            return self._known(t).double() if first or t.is_floating_point() or t.is_complex() else t.cpu()

        moved = [of(a, i == 0) for i, a in enumerate(args)]
        return func(*moved, **{key: of(value, False) for key, value in kwargs.items()}).to(torch.int32)

    def _padded(self, x: Tensor, pad: Sequence[int]) -> Tensor:
        """What is added in dimensions without channels belongs to the channels that are there."""
        labels = self._known(x)
        for i in range(len(pad) // 2):
            dim = x.dim() - 1 - i
            before, after = pad[2 * i], pad[2 * i + 1]
            if x.shape[dim] == 0:
                return torch.zeros((), dtype=torch.int32)
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                size = [-1] * x.dim()
                size[dim] = x.shape[dim] + before + after
                labels = first.expand(size)
            else:
                by_dim = [0, 0] * i + [before, after]
                labels = torch.nn.functional.pad(labels, by_dim)
        return labels

    def _joined(self, name: str, parts: list[Tensor], dim: int) -> Tensor:
        labels = [self._known(t) for t in parts]
        if name == "stack":
            labels = [found.unsqueeze(dim) for found in labels]
        else:
            labels = [found for found in labels if found.dim() > 1 or found.numel()]
        joined = torch.cat([found.contiguous() for found in labels], dim)
        dim %= joined.dim()
        if not any(varying(found).shape[dim] > 1 for found in labels):
            # Not the dimension of the channels: the parts have theirs in common.
            other = varying(joined)
            if other.dim() and other.shape[dim] > 1 and other.numel() > other.shape[dim]:
                for i in range(1, other.shape[dim]):
                    self.unify(other.select(dim, i - 1), other.select(dim, i))
                joined = self._same(joined)
        return joined

    def _pointwise(self, given: Sequence[Tensor]) -> Tensor | None:
        """Broadcast operands: what meets is coupled."""
        shape = torch.broadcast_shapes(*(t.shape for t in given))
        found: list[tuple[Tensor, list[int]]] = []  # labels, dimensions in which the operand itself has the full size
        for t in given:
            labels = self.labels.get(t)
            if labels is not None:
                missing = len(shape) - t.dim()
                labels = varying(labels)[(None,) * missing]
                full = [d for d in range(len(shape)) if d >= missing and t.shape[d - missing] == shape[d]]
                found.append((labels, full))
        found.sort(key=lambda operand: -len(operand[1]))
        result: Tensor | None = None
        for i, (a, a_full) in enumerate(found):
            met = [self._meet(a, a_full, b, b_full) for b, b_full in found[:i]]
            if result is None:
                result = a
                continue
            x, y = torch.broadcast_tensors(result, a)
            if not all(met) and bool(((x > 0) & (y > 0)).any()):
                self.spoil(a, ANOTHER)  # an element has one label
            result = torch.where((x > 0) | (y == 0), x, torch.where((y > 0) | (x == 0), y, x))
        return result

    def _meet(self, a: Tensor, a_full: list[int], b: Tensor, b_full: list[int]) -> bool:
        """Couple two operands of an operation by element; False when they lie in different dimensions."""
        a_dims, b_dims = ({d for d in range(t.dim()) if t.shape[d] > 1} for t in (a, b))
        a_has, b_has = bool((a > 0).any()), bool((b > 0).any())
        if (a_dims <= set(b_full) and b_dims <= set(a_full)) or (a_has and b_has and a_dims & b_dims):
            self.unify(a, b)
            return True
        if a_has and b_has and a_dims and b_dims and b_dims.isdisjoint(a_full) and a_dims.isdisjoint(b_full):
            for t in (a, b):
                self.spoil(t, ANOTHER)
        return False

    def _reduced(self, x: Tensor, dims: Any, keep: bool) -> Tensor | None:
        labels = self.labels.get(x)
        if labels is None or x.numel() == 0:
            return None
        over = list(range(x.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        over = sorted(d % x.dim() for d in over) if x.dim() else []
        for d in over:
            self.note("select", 0, d, labels)
        labels = self._agreed(labels, over)
        return labels if keep else labels[tuple(0 if d in over else slice(None) for d in range(x.dim()))]

    def _other(self, func: Any, made: Tensor, given: list[Tensor]) -> Tensor | None:
        """An operation with one main input, which may change the size of dimensions without channels."""
        x = given[0]
        labels = self.labels.get(x)
        for t in given[1:]:
            self.spoil(self.labels.get(t), f"its channels reach {func}, which is not followed")
        if labels is None:
            return None
        if made.dim() == x.dim() and x.numel():
            changed = [d for d in range(x.dim()) if made.shape[d] != x.shape[d]]
            if any(varying(labels).shape[d] > 1 for d in changed):
                labels = self._same(labels)
            if all(varying(labels).shape[d] == 1 for d in changed):
                for d in changed:
                    labels = labels.narrow(d, 0, 1)
                return labels
        fixed = [label for t in given[1:] if (label := self._first_fixed(t)) is not None]
        if fixed:
            self.spoil(labels, self.labels.reason(fixed[0]))
        self.spoil(labels, f"its channels reach {func}, which is not followed")
        return self._fixed()

    def _first_fixed(self, t: Tensor) -> int | None:
        labels = self.labels.get(t)
        if labels is None or not labels.numel():
            return None
        label = int(labels.flatten()[0])
        return label if label < 0 and self.labels.reason(label) != FIXED else None

    def _op_softmax(self, made: Any, x: Tensor, dim: int, *_: Any) -> list:
        self.note("select", 0, dim, self._known(x))
        return [self._known(x)]

    _op_log_softmax = _op_softmax

    def _op_glu(self, made: Any, x: Tensor, dim: int = -1) -> list:
        a, b = self._known(x).chunk(2, dim)
        self.unify(varying(a), varying(b))
        return [a]

    def _op_native_layer_norm(self, made: Any, x: Tensor, shape: Any, *weights: Any) -> list:
        if len(shape) == 1:
            self.note("norm", 0, -1, self._known(x))
        return [self._pointwise([x, *(w for w in weights[:2] if isinstance(w, Tensor))])]

    def _op_native_batch_norm(self, made: Any, x: Tensor, *weights: Any) -> list:
        shape = [1, -1] + [1] * (x.dim() - 2)
        return [self._pointwise([x, *(w.view(shape) for w in weights[:4] if isinstance(w, Tensor))])]

    _op_native_batch_norm_legit_no_training = _op_native_batch_norm

    def _op_unsafe_split(self, made: Any, x: Tensor, size: Any, dim: int = 0) -> list:
        return list(self._known(x).split(size, dim))

    def _op_native_group_norm(self, made: Any, x: Tensor, *weights: Any) -> list:
        shape = [1, -1] + [1] * (x.dim() - 2)
        return [self._pointwise([x, *(w.view(shape) for w in weights[:2] if isinstance(w, Tensor))])]

    def _op_pack_padded_sequence(self, made: Any, x: Tensor, *_: Any) -> list:
        return [self._agreed(self._known(x), [0, 1])[0], None]

    def _op_pad_packed_sequence(self, made: Any, data: Tensor, *_: Any) -> list:
        return [self._agreed(self._known(data), [0])[None], None]
