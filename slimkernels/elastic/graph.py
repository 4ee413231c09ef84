"""From coupled channels to width dimensions: which positions of which layers are switched on together."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from torch import nn

from slimkernels.elastic.absent import Spots
from slimkernels.elastic.coupling import Coupling
from slimkernels.elastic.layers import CONVS, RECURRENT
from slimkernels.elastic.plan import Dim, Run, WidthGroup
from slimkernels.elastic.recurrent import HIDDEN

Key = tuple[str, str]  # (module, side)
PRODUCED = ("out", "cell", "heads")  # sides of what a layer makes


@dataclass
class Analysis:
    """Width dimensions that look right, and why the others do not."""

    groups: dict[str, WidthGroup] = field(default_factory=dict)
    dims: dict[Key, Dim] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)  # name of the producing layer -> reason
    reasons: dict[str, str] = field(default_factory=dict)  # module -> reason why a group it belongs to was left alone
    reached: set[str] = field(default_factory=set)  # modules that the trace saw
    spots: Spots | None = None  # operations over channels that are written in the network
    # Recurrent layers given states of the full size at every width, attention layers given masks for all heads.
    states: list[str] = field(default_factory=list)

    def reject(self, names: set[str], reason: str) -> None:
        """Leave groups alone: their positions become fixed."""
        for name in names & self.groups.keys():
            group = self.groups.pop(name)
            self.rejected[name] = reason
            for module, _ in group.members:
                self.reasons.setdefault(module, reason)
        dims = {key: dim.without(names) for key, dim in self.dims.items()}
        self.dims = {key: dim for key, dim in dims.items() if dim.groups}


def width_groups(coupling: Coupling, model: nn.Module) -> Analysis:
    """The width dimensions of a traced model."""
    modules = dict(model.named_modules())
    classes = _classes(coupling, set())
    ties = _ties(coupling, classes)
    if ties:
        for a, b in ties:
            coupling.union(a, b)
        classes = _classes(coupling, set())
    poison = {coupling.find(node): reason for node, reason in reversed(coupling.poison)}
    summed = {coupling.find(node) for node in coupling.summed}
    analysis = Analysis()
    clusters: dict[frozenset, list[int]] = defaultdict(list)
    for label, members in classes.items():
        clusters[frozenset(Counter(key for key, _ in members).items())].append(label)
    unit_of: dict[int, tuple[str, int]] = {}
    for labels in clusters.values():
        _add_group(analysis, labels, classes, poison, summed, unit_of, modules)
    _add_dims(analysis, coupling, unit_of)
    _reject_unsupported(analysis, modules)
    order = {name: 2 * i for i, name in enumerate(modules)}
    order |= {name + HIDDEN: i + 1 for name, i in order.items()}
    analysis.groups = dict(sorted(analysis.groups.items(), key=lambda item: order[item[0]]))
    return analysis


def _classes(coupling: Coupling, without: set[Key]) -> dict[int, list[tuple[Key, int]]]:
    """Sets of coupled positions that a layer produces, in order of their first position."""
    classes: dict[int, list[tuple[Key, int]]] = defaultdict(list)
    for key in coupling.offsets:
        if key not in without:
            for position, label in enumerate(coupling.labels(key)):
                classes[label].append((key, position))
    return {label: m for label, m in classes.items() if any(side in PRODUCED for (_, side), _ in m)}


def _ties(coupling: Coupling, classes: dict[int, list]) -> list[tuple[int, int]]:
    """Parts of one layer's output that go different ways (the halves of a gate, q, k and v) are switched on together.

    Gives the pairs of positions to couple. Only equal parts can be: others are left alone later.
    """
    signature = {label: frozenset(Counter(key for key, _ in members).items()) for label, members in classes.items()}
    pairs = []
    for key, (start, size) in coupling.offsets.items():
        if key[1] != "out":
            continue
        labels = coupling.labels(key)
        kinds = [signature[label] for label in labels]
        edges = [i for i in range(size) if i == 0 or kinds[i] != kinds[i - 1]]
        if len(edges) > 1:
            lengths = {b - a for a, b in zip(edges, [*edges[1:], size], strict=True)}
            if len(lengths) == 1:
                n = lengths.pop()
                pairs += [(start + i, start + i % n) for i in range(n, size)]
    return pairs


def _add_group(
    analysis: Analysis,
    labels: list[int],
    classes: dict[int, list],
    poison: dict[int, str],
    summed: set[int],
    unit_of: dict[int, tuple[str, int]],
    modules: dict[str, nn.Module],
) -> None:
    keys = {key for key, _ in classes[labels[0]]}
    producers = [name for name in modules if (name, "out") in keys or (name, "heads") in keys]
    cells = [name for name in modules if (name, "cell") in keys]
    # A depthwise convolution passes channels on: the layer that makes them gives the name.
    made = [name for name in producers if (name, "in") not in keys] or producers
    name = made[0] if made else cells[0] + HIDDEN
    # The width of a recurrent layer is that of one direction, that of attention is that of q.
    cell = cells[0] if cells else "", "cell"
    counted = next(key for key in ((name, "state"), (name, "heads"), (name, "out"), cell) if key in keys)
    positions = {label: [p for key, p in classes[label] if key == counted] for label in labels}
    ordered = sorted(labels, key=lambda label: positions[label][0])
    reason = next((poison[label] for label in ordered if label in poison), None)
    if (
        reason is None
        and summed.isdisjoint(labels)
        and not any(
            side in ("in", "key", "value", "cell") or side.startswith("param")
            for _, side in keys - {(p, "in") for p in producers}
        )
    ):
        reason = "no layer takes its channels in"
    if reason is None and len(labels) < 2:
        reason = "its channels cannot be taken apart"
    if reason is not None:
        # A layer can have several such groups; the first reason is kept.
        analysis.rejected.setdefault(name, reason)
        for module, _ in keys:
            analysis.reasons.setdefault(module, reason)
        return
    if name in analysis.groups:
        analysis.reject({name}, "parts of its output are used in different ways")
        for module, _ in keys:
            analysis.reasons.setdefault(module, "parts of its output are used in different ways")
        return
    unit = len(positions[ordered[0]])
    analysis.groups[name] = WidthGroup(
        name, len(ordered), unit, tuple(sorted(keys, key=lambda k: (list(modules).index(k[0]), k[1])))
    )
    unit_of.update({label: (name, i) for i, label in enumerate(ordered)})


def _add_dims(analysis: Analysis, coupling: Coupling, unit_of: dict[int, tuple[str, int]]) -> None:
    members = {key for group in analysis.groups.values() for key in group.members}
    for key in coupling.offsets:
        if key in members:
            units = [unit_of.get(label) for label in coupling.labels(key)]
            units = [unit if unit is not None and unit[0] in analysis.groups else None for unit in units]
            runs, bad = _runs(units, {name: group.units for name, group in analysis.groups.items()})
            analysis.dims[key] = Dim(*key, tuple(runs))
            if bad:
                analysis.reject(bad, f"its channels reach {key[0]} in another order")


def _runs(units: list[tuple[str, int] | None], full: dict[str, int]) -> tuple[list[Run], set[str]]:
    """Positions as runs, and the groups whose units are not all there in order."""
    runs: list[Run] = []
    bad: set[str] = set()
    i = 0
    while i < len(units):
        unit = units[i]
        if unit is None:
            j = i
            while j < len(units) and units[j] is None:
                j += 1
            runs.append(Run(None, j - i))
        else:
            name = unit[0]
            j = i
            while j < len(units) and units[j] == unit:
                j += 1
            k = j - i
            j = i + k * full[name]
            if units[i:j] == [(name, u) for u in range(full[name]) for _ in range(k)]:
                runs.append(Run(name, k * full[name], k))
            else:
                bad.add(name)
                j = i + k
                runs.append(Run(None, k))
        i = j
    return runs, bad


def _reject_unsupported(analysis: Analysis, modules: dict[str, nn.Module]) -> None:
    """Leave alone what the layers cannot slice: an output that is no leading slice, a group norm after a concat."""
    for (name, side), dim in list(analysis.dims.items()):
        module = modules[name]
        simple = dim.blocks == 1
        if side == "cell" and not simple:
            analysis.reject(dim.groups, f"the hidden units of {name} are no leading slice")
        elif side in ("key", "value") and not simple and module.in_proj_weight is None:
            analysis.reject(dim.groups, f"the {side}s of {name} are no leading slice")
        elif (
            side == "out"
            and not simple
            and not isinstance(module, (nn.Linear, *CONVS))
            and not (isinstance(module, RECURRENT) and dim.blocks)
        ):
            analysis.reject(dim.groups, f"the output of {name} is no leading slice")
        elif isinstance(module, nn.GroupNorm) and not simple:
            analysis.reject(dim.groups, f"the group norm {name} takes several width dimensions")
