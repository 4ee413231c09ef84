"""Attention written by hand, of which the trace cannot tell what a narrower network does: all that may be right is tried."""

from collections.abc import Callable

from torch import nn

from slimkernels.elastic.coupling import Coupling
from slimkernels.elastic.graph import Analysis

# Whole heads; channels of every head; the same where the code makes heads of the features around the attention:
# view(batch, steps, heads, features // heads).
WAYS = ("whole", "all", "tied")


def best(attempt: Callable[[str], tuple[bool, float, Analysis]]) -> Analysis:
    """What the way gives that makes the smallest network. ``attempt`` also says whether there are heads at all."""
    heads, least, found = attempt(WAYS[0])
    for way in WAYS[1:] if heads else ():
        _, size, other = attempt(way)
        if size < least:
            least, found = size, other
    return found


def tie_features(coupling: Coupling, model: nn.Module) -> None:
    """Switch the features that a linear layer takes in on together with the channels of the heads that it puts out: as many
    features at once as there are heads."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or (name, "out") not in coupling.offsets:
            continue
        labels = coupling.labels((name, "out"))
        features, start = module.in_features, coupling.offsets[name, "out"][0]
        head = next((i for i in range(1, len(labels)) if labels[i] == labels[0]), 0)
        if head < 2 or features % head or features // head < 2 or len(labels) % features:
            continue
        for i in range(len(labels)):
            coupling.union(start + i % head, start + i)
        for i in range(features):
            coupling.union(start + i * head // features, coupling.node((name, "in"), i))
