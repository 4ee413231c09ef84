"""What the frozen layers of a CIFAR ResNet give its last block, computed once."""

from pathlib import Path

import torch
from torch import Tensor

from slimkernels.models import CifarResNet
from slimkernels.recipes.data import Split, augment, prepared
from slimkernels.recipes.pipeline import writing


@torch.no_grad()
def before_last_block(network: CifarResNet, images: Split, cache: Path | None) -> Split:
    """The images as the last block sees them."""
    name, generator = images.name, torch.Generator().manual_seed(0)

    def outputs(x: Tensor, augmented: bool) -> Tensor:
        found = []
        for part in x.split(250):
            y = augment(prepared(part), generator) if augmented else prepared(part)
            y = network.layer2(network.layer1(network.relu(network.bn1(network.conv1(y)))))
            found.append(network.layer3[1](network.layer3[0](y)).half())
        return torch.cat(found)

    if cache is not None and cache.exists():
        kept = torch.load(cache, weights_only=True)
        fresh = outputs(images.test_x[:100], False)
        if kept["train"].shape[0] != len(images.train_x) or not torch.allclose(kept["test"][:100], fresh, atol=1e-2):
            raise ValueError(f"train hyper: expected a features file of these weights and images, got {cache}")
    else:
        kept = {"train": outputs(images.train_x, True), "test": outputs(images.test_x, False)}
        if cache is not None:
            with writing(cache) as aside:
                torch.save(kept, aside)
    return Split(kept["train"], images.train_y, kept["test"][: len(images.test_y)], images.test_y, name)
