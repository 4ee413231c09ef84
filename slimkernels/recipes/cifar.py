"""A CIFAR ResNet-20 that somebody else trained becomes slimmable, on a user's copy of CIFAR-10."""

import functools
from pathlib import Path

import torch
from torch import nn

from slimkernels.models import CifarResNet
from slimkernels.recipes.cifar_data import Progress, cifar10
from slimkernels.recipes.data import Split, load_into, load_weights
from slimkernels.recipes.pipeline import Recipe

WIDTHS = (1.0, 0.75, 0.5, 0.25)
# The channels between blocks: the stem and the two shortcuts that begin a stage carry them.
RESIDUAL = ("conv1", "layer2.0.shortcut", "layer3.0.shortcut")


def plain(extracted: nn.Module) -> CifarResNet:
    """An untrained plain network of the same widths."""
    assert isinstance(extracted, CifarResNet)
    stages = (extracted.layer1, extracted.layer2, extracted.layer3)
    firsts = [stage[0] for stage in stages]
    channels, inner = [[getattr(b, name).out_channels for b in firsts] for name in ("conv2", "conv1")]
    return CifarResNet(2 + 6 * len(extracted.layer1), channels, inner, extracted.linear.out_features)


def recipe(
    data: str | Path,
    weights: str | Path,
    *,
    steps: int = 400,
    batch_size: int = 128,
    lr: float = 0.05,
    slim: str = "blocks",
    test_images: int | None = None,
    amp: str | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """``slim``: "blocks" slims the channels inside the residual blocks, "all" those between them as well."""
    if slim not in ("blocks", "all"):
        raise ValueError(f"train cifar: expected slim to be 'blocks' or 'all', got {slim!r}")
    network = CifarResNet(20)
    load_into(network, load_weights(weights), weights)
    return Recipe(
        name="ResNet-20" if slim == "blocks" else "ResNet-20, residual channels too",
        network=network,
        plain=plain,
        data=limited(cifar10(data, progress), test_images),
        widths=WIDTHS,
        convert={
            "widths": sorted(WIDTHS),
            "divisor": 4,
            "norm": "switchable",
            "ignore": RESIDUAL if slim == "blocks" else (),
        },
        steps=steps,
        batch_size=batch_size,
        optimizer=functools.partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True),
        weight_decay=5e-4,
        trainer={"distill": "kl", "clip_grad": 5.0, "amp": amp},
        flip=True,
        warmup=0.1,
        calibration_images=5000,
    )


def limited(data: Split, test_images: int | None) -> Split:
    """The first ``test_images`` of the test part in a fixed random order; None: all of them."""
    if test_images is None:
        return data
    chosen = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))[:test_images]
    name = f"{data.name}, {len(chosen):,} test images"
    return Split(data.train_x, data.train_y, data.test_x[chosen], data.test_y[chosen], name)
