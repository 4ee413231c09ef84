"""The order of the training data: seeded per epoch, with a position that a resumed run returns to."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class EmptyEpochError(ValueError):
    """The loader gave no batch in a whole epoch."""


class DataStream:
    """A loader read epoch after epoch, batch after batch.

    At the start of every epoch the global random generators (torch, numpy, random) and those of the loader and its
    samplers are seeded with (seed, epoch), and ``set_epoch`` of a sampler is called. An epoch's order is therefore a
    function of the seed, and a position inside it is found again by reading as many batches as had been read.

    Args:
        rank: makes the global generators differ between ranks; the loader's own generators are equal on all.

    Raises: ValueError when the loader cannot be iterated a second time.
    """

    def __init__(self, loader: Iterable[Any], seed: int, rank: int = 0) -> None:
        if iter_is_self(loader):
            raise ValueError(
                "train: expected a train_loader that can be iterated again every epoch, "
                f"got a {type(loader).__name__} that cannot"
            )
        self.loader, self.seed, self.rank = loader, seed, rank
        self.epoch = 0
        self.position = 0  # batches read in this epoch
        self._iterator: Iterator[Any] | None = None
        self._ended = False

    def __len__(self) -> int:
        """Batches an epoch, 0 when the loader does not tell."""
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def next_batch(self) -> Any | None:
        """The next batch; None at the end of the epoch, until ``next_epoch``.

        Raises: ValueError when an epoch has no batch; whatever the loader raises.
        """
        if self._ended:
            return None
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self.position == 0:
                raise EmptyEpochError(
                    "train: expected a train_loader with at least one batch an epoch, got none"
                ) from None
            self._ended = True
            return None
        except BaseException:
            self._iterator = None  # a generator that raised would only seem to end
            raise
        self.position += 1
        return batch

    def next_epoch(self) -> None:
        """Begins the next epoch."""
        self.seek(self.epoch + 1, 0)

    @property
    def lost(self) -> bool:
        """Whether the loader failed in mid-epoch: ``seek`` the position before going on."""
        return self._iterator is None and self.position > 0

    def _start(self) -> Iterator[Any]:
        seed = self.seed * 1_000_003 + self.epoch * 8_191
        for generator in generators(self.loader):
            generator.manual_seed(seed % 2**63)
        for sampler in _samplers(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        seed = (seed + self.rank * 131) % 2**63
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        return iter(self.loader)

    def seek(self, epoch: int, position: int) -> None:
        """Goes to a position by reading the epoch's first ``position`` batches again."""
        self.epoch, self.position, self._iterator, self._ended = epoch, 0, None, False
        for _ in range(position):
            if self.next_batch() is None:
                raise ValueError(
                    f"train: expected a train_loader with at least {position} batches an epoch (the checkpoint is at "
                    "that one), got fewer; it is not the loader that the checkpoint was written with"
                )


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, in types that ``torch.load(weights_only=True)`` takes."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    keys = numpy_state["state"]["key"].astype(np.int64)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**numpy_state, "state": {"key": torch.from_numpy(keys), "pos": numpy_state["state"]["pos"]}},
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    position = state["numpy"]["state"]
    keys = position["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": keys, "pos": position["pos"]}})
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


@contextmanager
def isolated_rng(*loaders: Any) -> Iterator[None]:
    """Whatever is drawn inside, by the global generators or those of the loaders, leaves them as they were."""
    state = rng_state()
    own = [(generator, generator.get_state()) for loader in loaders for generator in generators(loader)]
    try:
        yield
    finally:
        set_rng_state(state)
        for generator, generator_state in own:
            generator.set_state(generator_state)


def generators(loader: Any) -> list[torch.Generator]:
    """The distinct generators that a DataLoader and its samplers hold."""
    found: list[torch.Generator] = []
    for holder in (loader, *_samplers(loader)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
            found.append(generator)
    return found


def iter_is_self(loader: Any) -> bool:
    """Whether the loader is an iterator, which is spent after one pass."""
    return hasattr(loader, "__next__")


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    candidates = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(sampler): sampler for sampler in candidates if sampler is not None}.values())
