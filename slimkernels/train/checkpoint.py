"""Checkpoints that are never half-written: written aside, synced to disk, renamed; the last few are kept."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "slimkernels.train"
VERSION = 1
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to something else."""


class CheckpointStore:
    """The checkpoints of one run in one directory, ``step-00000120.pt`` and so on.

    Only plain data is ever loaded (``weights_only=True``): a foreign file cannot run code.

    Args:
        keep: how many of the newest checkpoints stay on disk; at least 2, so that there is one to fall back to.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3) -> None:
        if keep < 2:
            raise ValueError(f"CheckpointStore: expected keep of at least 2 (one to fall back to), got {keep}")
        self.directory, self.keep = Path(directory), keep
        self._read_back = False

    def steps(self) -> list[int]:
        """The steps on disk, newest first."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.pt"

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Writes the checkpoint of a step; a crash at any moment leaves either the whole file or none.

        The first one is read back before it gets its name, so that a state which could not be loaded again (an
        optimizer or scheduler that keeps objects of its own) is told now and not at the resume.

        Raises: CheckpointError when the state holds something that cannot be loaded again.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.glob(".step-*.tmp"):
            stale.unlink(missing_ok=True)  # of a run that was killed while it wrote
        path = self.path(step)
        aside = path.with_name(f".{path.name}.tmp")
        try:
            write_synced(aside, {"format": FORMAT, "version": VERSION, "step": step, **state})
            if not self._read_back:
                read(aside)
                self._read_back = True
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync_directory(self.directory)
        for old in self.steps()[self.keep :]:
            self.path(old).unlink(missing_ok=True)
        return path

    def latest(self) -> tuple[dict[str, Any], Path, list[str]] | None:
        """The newest checkpoint that can be read, its path, and one sentence for every newer one that cannot; None
        without any.

        Raises: CheckpointError when there are checkpoints and none can be read.
        """
        failures: list[str] = []
        for step in self.steps():
            try:
                return read(self.path(step)), self.path(step), failures
            except CheckpointError as error:
                failures.append(str(error))
        if failures:
            raise CheckpointError(f"{failures[0]}; no older checkpoint in {self.directory} can be read either")
        return None

    def clear(self) -> None:
        """Deletes every checkpoint of the directory (and nothing else)."""
        for step in self.steps():
            self.path(step).unlink(missing_ok=True)


def write_synced(path: Path, state: dict[str, Any]) -> None:
    """torch.save, then wait until the bytes are on disk."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Makes a rename inside the directory durable (where the system can open directories)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint of a trainer, loaded to the CPU.

    Raises: CheckpointError when the file is missing, cut off, damaged, or not a checkpoint of a slimkernels trainer.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: expected a file, got {path}, which does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise CheckpointError(f"checkpoint: {path} is cut off or no checkpoint at all ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"checkpoint: {path} is damaged (its part {damaged} fails the checksum)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint: {path} cannot be loaded as plain data ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint: {path} was not written by a slimkernels trainer")
    if state["version"] != VERSION:
        raise CheckpointError(f"checkpoint: expected format version {VERSION} in {path}, got {state['version']}")
    return state
