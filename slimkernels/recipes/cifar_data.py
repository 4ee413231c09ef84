"""CIFAR-10 from class folders, a zip of class folders, or the pickled or binary batches of its author.

Loading a pickle can run anything: these are read by an unpickler that builds bytes, numbers, lists and dicts only.
"""

import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from slimkernels.recipes.data import DataError, Split

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
RECORD = 1 + 3 * 32 * 32  # binary batches: a label, then red, green and blue planes
MAX_IMAGE_BYTES = 2**20
MAX_BATCH_BYTES = 64 * 2**20  # the real batches have 31 MB
EXPECTED = "a folder or zip with train/<class>/ and test/<class>/ images, or CIFAR-10's python or binary batches"
Progress = Callable[[str, int, int], None]


def cifar10(path: str | Path, progress: Progress | None = None) -> Split:
    """CIFAR-10 as uint8 images.

    ``path``: class folders, a zip of them, ``cifar-10-batches-py`` or ``-bin``, or their tar.gz.

    Raises: DataError when the files are missing, incomplete or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"cifar10: expected {EXPECTED}, got {path}, which does not exist")
    if path.is_file() and zipfile.is_zipfile(path):
        parts = _from_zip(path, progress)
    elif path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
        parts = _from_tar(path)
    elif path.is_dir() and (folder := _batch_folder(path)):
        parts = {part: _read_batches(part, folder) for part in BATCHES}
    elif path.is_dir() and (path / "train").is_dir() and (path / "test").is_dir():
        parts = _from_folders(path, progress)
    else:
        raise DataError(f"cifar10: expected {EXPECTED}, got {path}")
    (train_x, train_y), (test_x, test_y) = parts["train"], parts["test"]
    jpeg = path.suffix == ".zip" or (path / "train").is_dir()
    return Split(train_x, train_y, test_x, test_y, "CIFAR-10 (JPEG copy)" if jpeg else "CIFAR-10")


def _decode(name: str, raw: bytes) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise DataError("cifar10: reading image files needs pillow; type 'pip install pillow'") from None
    try:
        with Image.open(io.BytesIO(raw)) as image:
            if image.size != (32, 32):
                raise DataError(
                    f"cifar10: expected images of 32 x 32 pixels, got {image.size[0]} x {image.size[1]} in {name}"
                )
            return np.asarray(image.convert("RGB"))
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cifar10: {name} is no image or is cut off ({error})") from error


def _stack(
    part: str, named: Iterable[tuple[str, str, bytes]], count: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """(class, name, bytes) of every image -> images (n, 3, 32, 32) uint8 and labels."""
    images = np.empty((count, 32, 32, 3), dtype=np.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for i, (label, name, raw) in enumerate(named):
        images[i] = _decode(name, raw)
        labels[i] = CLASSES.index(label)
        if progress and (i % 1000 == 0 or i + 1 == count):
            progress(part, i + 1, count)
    missing = [c for c, n in zip(CLASSES, torch.bincount(labels, minlength=10).tolist(), strict=True) if n == 0]
    if missing:
        raise DataError(f"cifar10: expected images of every class in {part}, got none of {', '.join(missing)}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def _from_folders(root: Path, progress: Progress | None) -> dict[str, tuple[Tensor, Tensor]]:
    parts = {}
    for part in BATCHES:
        files = [
            (c, f) for c in CLASSES for f in sorted((root / part / c).glob("*")) if f.suffix.lower() in IMAGE_SUFFIXES
        ]

        def read(files: list[tuple[str, Path]] = files) -> Iterator[tuple[str, str, bytes]]:
            for label, file in files:
                with file.open("rb") as opened:
                    yield label, str(file), opened.read(MAX_IMAGE_BYTES)

        parts[part] = _stack(part, read(), len(files), progress)
    return parts


def _from_zip(path: Path, progress: Progress | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Entries ``[folder/]train|test/<class>/<name>.jpg``; read in memory, nothing is unpacked to disk."""
    parts = {}
    try:
        with zipfile.ZipFile(path) as archive:
            found: dict[str, list[tuple[str, zipfile.ZipInfo]]] = {part: [] for part in BATCHES}
            for info in archive.infolist():
                pieces = info.filename.split("/")
                if len(pieces) < 3 or not pieces[-1].lower().endswith(IMAGE_SUFFIXES):
                    continue
                part, label = pieces[-3], pieces[-2]
                if part in found and label in CLASSES:
                    found[part].append((label, info))

            def read(entries: list[tuple[str, zipfile.ZipInfo]]) -> Iterator[tuple[str, str, bytes]]:
                for label, info in sorted(entries, key=lambda e: (CLASSES.index(e[0]), e[1].filename)):
                    with archive.open(info) as opened:
                        yield label, f"{path}/{info.filename}", opened.read(MAX_IMAGE_BYTES)

            for part, entries in found.items():
                parts[part] = _stack(part, read(entries), len(entries), progress)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cifar10: {path} is damaged or cut off ({error}); get the file again") from error
    return parts


def _batch_folder(path: Path) -> Path | None:
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        if (folder / "test_batch").is_file() or (folder / "test_batch.bin").is_file():
            return folder
    return None


def _read_batches(part: str, folder: Path) -> tuple[Tensor, Tensor]:
    pieces = []
    for name in BATCHES[part]:
        pickled, binary = folder / name, folder / f"{name}.bin"
        file = pickled if pickled.is_file() else binary
        if not file.is_file():
            raise DataError(f"cifar10: expected the batch {name} in {folder}, got no such file")
        with file.open("rb") as opened:
            pieces.append(_parse_batch(str(file), opened.read(MAX_BATCH_BYTES), file is binary))
    return torch.cat([x for x, _ in pieces]), torch.cat([y for _, y in pieces])


def _from_tar(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The author's archive, read member by member in memory."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = [name for names in BATCHES.values() for name in names]
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.split("/")[-1]
                stem = name.removesuffix(".bin")
                if stem in wanted and member.isfile() and (opened := archive.extractfile(member)) is not None:
                    found[stem] = _parse_batch(f"{path}/{member.name}", opened.read(MAX_BATCH_BYTES), stem != name)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"cifar10: {path} is damaged or cut off ({error}); get the file again") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"cifar10: expected the batches of CIFAR-10 in {path}, got none named {missing[0]}")
    joined = {part: [found[name] for name in names] for part, names in BATCHES.items()}
    return {part: (torch.cat([x for x, _ in b]), torch.cat([y for _, y in b])) for part, b in joined.items()}


def _parse_batch(name: str, raw: bytes, binary: bool) -> tuple[Tensor, Tensor]:
    if binary:
        if not raw or len(raw) % RECORD:
            raise DataError(f"cifar10: expected records of {RECORD} bytes in {name}, got {len(raw)} bytes")
        table = np.frombuffer(raw, dtype=np.uint8).reshape(-1, RECORD)
        pixels, labels = table[:, 1:], table[:, 0].tolist()
    else:
        pixels, labels = _unpickle_batch(name, raw)
    if len(labels) != len(pixels) or not all(type(n) is int and 0 <= n < 10 for n in labels):
        raise DataError(f"cifar10: expected a label from 0 to 9 for each image in {name}, got other labels")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64)


class _Array:
    """Stands in for a numpy array in a pickle: keeps the shape and the bytes, runs nothing."""

    def __init__(self, *_: Any):
        self.state: tuple = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, tuple) else ()

    def images(self) -> np.ndarray:
        if len(self.state) != 5:
            raise ValueError("no array")
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _DType) or dtype.code not in ("u1", b"u1") or fortran or not isinstance(raw, bytes):
            raise ValueError("no array of bytes in C order")
        return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


class _DType:
    """Stands in for a numpy dtype: keeps its code."""

    def __init__(self, code: Any = None, *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """The byte order of single bytes does not matter."""


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes into an old pickle."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): _latin1,
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-10 has no use for") from None


def _unpickle_batch(name: str, raw: bytes) -> tuple[np.ndarray, list]:
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise ValueError("no dict")
        data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
        if not isinstance(data, _Array) or not isinstance(labels, list):
            raise ValueError("no 'data' array or no 'labels' list")
        pixels = data.images()
        if pixels.ndim != 2 or pixels.shape[1] != RECORD - 1:
            raise ValueError(f"images of shape {pixels.shape}")
    except Exception as error:  # a hostile pickle can raise anything
        raise DataError(
            f"cifar10: {name} is no batch of CIFAR-10 or is cut off ({error or type(error).__name__})"
        ) from error
    return pixels, labels
