"""The demo: a digit classifier that somebody else trained becomes slimmable in a minute."""

import functools

import torch
from torch import nn

from slimkernels.models import DigitCNN
from slimkernels.recipes.data import digit_weights, digits, load_into
from slimkernels.recipes.pipeline import Recipe

WIDTHS = (1.0, 0.75, 0.5, 0.25, 0.125)
NOTES = [
    "The 1,000 test digits were kept out of the fine-tuning, but all 5,000 are probably part of the data that the original"
    " network was trained on: the accuracies say what slimming costs, not how the network does on digits it has never seen.",
]


def plain(extracted: nn.Module) -> DigitCNN:
    """An untrained plain network of the same widths."""
    convs = [m for m in extracted.modules() if isinstance(m, nn.Conv2d)]
    hidden = next(m for m in extracted.modules() if isinstance(m, nn.Linear))
    return DigitCNN([conv.out_channels for conv in convs], hidden.out_features)


def recipe(steps: int = 700, batch_size: int = 64) -> Recipe:
    network = DigitCNN()
    load_into(network, digit_weights(), "the packaged digit weights")
    return Recipe(
        name="digit CNN",
        network=network,
        plain=plain,
        data=digits(),
        widths=WIDTHS,
        convert={"widths": (0.125, 1.0), "divisor": 4, "sort": "l1"},
        steps=steps,
        batch_size=batch_size,
        optimizer=functools.partial(torch.optim.AdamW, lr=1.5e-3),
        weight_decay=1e-2,
        trainer={"widths": 4, "distill": "kl"},
        augmented=False,  # shifted digits cost the widest network more than they give the narrow ones
        notes=list(NOTES),
    )
