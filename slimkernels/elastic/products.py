"""What the follower knows of labels and of products: what these sum over is one channel on both sides, and heads go through
them one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimkernels.elastic.absent import Place, Spot, Spots
from slimkernels.elastic.coupling import Coupling
from slimkernels.elastic.labels import FIXED, Labels, agreed, varying

ANOTHER = "its channels are multiplied with others of another dimension"


class Products:
    """The part of ``Follower`` that knows products. ``heads`` says what a product of several heads makes a unit of:
    ``whole`` heads, or the channels at one place in ``all`` of them."""

    labels: Labels
    coupling: Coupling
    spots: Spots
    heads: str
    at: Place
    poison: Callable[[int, str], None]

    def _known(self, t: Any) -> Tensor:
        """Labels, zeros where there are none."""
        found = self.labels.get(t)
        return torch.zeros((), dtype=torch.int32).expand(t.shape) if found is None else found

    def _same(self, labels: Tensor) -> Tensor:
        """The same label for all that is coupled."""
        found, where = labels.unique(return_inverse=True)
        roots = [n if n <= 0 else self.coupling.find(n - 1) + 1 for n in found.tolist()]
        return torch.tensor(roots, dtype=torch.int32)[where]

    def _fixed(self) -> Tensor:
        return torch.full((), self.labels.fixed(FIXED), dtype=torch.int32)

    def _agreed(self, labels: Tensor, dims: list[int]) -> Tensor:
        """Size 1 in ``dims``: the label that all have there, or 0."""
        labels = varying(labels)
        if any(labels.shape[d] > 1 for d in dims):
            labels = self._same(labels)
        return agreed(labels, dims)

    def note(self, kind: str, argument: int, dim: int, labels: Tensor) -> None:
        """The operation that runs has channels in a dimension of an argument, and is to leave the inactive ones out."""
        labels = varying(labels)
        dim %= max(1, labels.dim())
        if not labels.dim() or not bool((labels > 0).any()):
            return
        if kind in ("zero", "attention") or (labels.shape[dim] > 1 and labels.numel() == labels.shape[dim]):
            self.spots.add(self.at, Spot(kind, argument, dim, labels))
            self.coupling.summed.update(n - 1 for n in labels.unique().tolist() if n > 0)

    def _op_mm(self, made: Any, a: Tensor, b: Tensor) -> list:
        return [self._product(self._known(a), self._known(b), 0)]

    _op_bmm = _op_matmul = _op_mm

    def _pointwise(self, given: Sequence[Tensor]) -> Tensor | None:
        raise NotImplementedError

    def _op_addmm(self, made: Any, c: Tensor, a: Tensor, b: Tensor, *_: Any) -> list:
        product = torch.empty(made[0].shape, device="cpu")
        self.labels.put(product, self._product(self._known(a), self._known(b), 1))
        return [self._pointwise([product, c])]

    _op_baddbmm = _op_addmm

    def _op_mv(self, made: Any, a: Tensor, b: Tensor) -> list:
        self.note("zero", 0, -1, self._known(a))
        return [self._product(self._known(a), self._known(b)[:, None], None)[..., 0]]

    def _op_dot(self, made: Any, a: Tensor, b: Tensor) -> list:
        self.note("zero", 0, 0, self._known(a))
        self._product(self._known(a)[None], self._known(b)[:, None], None)
        return [None]

    def _op_linear(self, made: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any) -> list:
        self.note("zero", 0, -1, self._known(x))
        return [self._product(self._known(x), self._known(weight).transpose(-1, -2), None)]

    def _op_convolution(self, made: Any, x: Tensor, weight: Tensor, bias: Any, *rest: Any) -> list:
        transposed, groups = rest[3], rest[5]
        labels = self._known(x).movedim(1, -1)
        taken = self._known(weight).movedim(0 if transposed else 1, 0)
        if groups == 1:
            self.note("zero", 0, 1, self._known(x))
            self._summed(labels, taken)
        else:
            self.spoil(labels, "its channels reach a grouped convolution with a weight of its own")
        return [self._fixed()]

    def _attention(self, made: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        known = [self._known(t) for t in (q, k, v)]
        if q.dim() > 2 and q.shape[-3] != k.shape[-3]:  # several heads of q take one of k and v
            known[1:] = [t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in known[1:]]
        self.note("attention", 0, -1, known[0])
        scores = self._product(known[0], known[1].transpose(-1, -2), None)
        return self._product(scores, known[2], None)

    def _product(self, a: Tensor, b: Tensor, argument: int | None) -> Tensor:
        """Of (..., n, k) and (..., k, m). Channels in k are to be left out of both factors; ``argument`` is the first's
        place in the operation."""
        a, b = varying(a), varying(b)
        inner_a, inner_b = a.shape[-1] > 1, b.shape[-2] > 1 if b.dim() > 1 else True
        apart = self._of_heads(a, b)
        if argument is not None and inner_a:
            self.note("zero", argument, -1, a)
        if argument is not None and inner_b:
            self.note("zero", argument + 1, -2, b)
        if apart and self.heads == "whole":
            # All channels of a head are one unit, and so is what it makes.
            ends = [t[..., :1, :1] for t in (a, b)]
            for t, end in zip((a, b), ends, strict=True):
                if bool((t > 0).any()):
                    self.unify(t, end)
            if inner_a or inner_b or all(bool((end > 0).any()) for end in ends):
                self.unify(*ends)
            x, y = torch.broadcast_tensors(*ends)
            return self._same(torch.where(x > 0, x, y))
        if apart:
            for t in (a, b):
                for d in range(t.dim() - 2):
                    self.unify(t, t.narrow(d, 0, 1))
        if inner_a or inner_b:
            self._summed(a, b.movedim(-2, 0))
        none = torch.zeros((), dtype=torch.int32)
        rows = none[(None,) * a.dim()] if inner_a else a
        columns = none[(None,) * b.dim()] if inner_b else b
        x, y = torch.broadcast_tensors(rows, columns)
        if bool(((x > 0) & (y > 0)).any()):
            for t in (x, y):
                self.spoil(t, ANOTHER)
        return torch.where((x > 0) | (y == 0), x, y)

    def _of_heads(self, a: Tensor, b: Tensor) -> bool:
        """Whether the channels are others in every product of a batch."""
        found = [t.numel() > t.shape[-1] * t.shape[-2] and bool((t > 0).any()) for t in (a, b) if t.dim() > 2]
        apart = len(found) == 2 and any(found)
        self.coupling.heads = self.coupling.heads or apart
        return apart

    def _summed(self, a: Tensor, b: Tensor) -> None:  # (..., k) and (k, ...)
        """What a product sums over is the same channel on both sides, and in every row and column."""
        a, b = varying(a), varying(b)
        columns = [a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1).t()]
        best = []
        for rows in columns:
            for i in range(1, len(rows)):
                self.unify(rows[0], rows[i])
            best.append(torch.where((rows > 0).any(0), rows.amax(0), rows.amin(0)))
        if bool((best[0] > 0).any()) or bool((best[1] > 0).any()):
            self.unify(*best)

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Couple labels that stand at the same place; a channel that meets a given size has to stay."""
        a, b = torch.broadcast_tensors(a, b)
        differ = (a != b) & (a != 0) & (b != 0)
        if not bool(differ.any()):
            return
        for x, y in torch.stack([a[differ], b[differ]]).unique(dim=1).t().tolist():
            if x > 0 and y > 0:
                self.coupling.union(x - 1, y - 1)
            elif max(x, y) > 0:
                self.poison(max(x, y) - 1, self.labels.reason(min(x, y)))

    def spoil(self, labels: Tensor | None, reason: str) -> None:
        """These channels have to stay."""
        if labels is not None:
            for label in varying(labels).unique().tolist():
                if label > 0:
                    self.poison(label - 1, reason)
