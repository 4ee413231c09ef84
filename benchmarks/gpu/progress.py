"""What a step has done so far: a file of one line an event, which outlives the process that writes it.

A hard CUDA fault, a crash or a hang ends a process at any point. The parent finds the item that was on, and starts the
step again without what it has behind it.
"""

import json
import os
from pathlib import Path

import torch

CONTEXT_LOST = 75  # exit status: no CUDA call of this process will work again


def context_error() -> str:
    """What CUDA says of this process, "" when all is well."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def file_name(name: str) -> str:
    """Of a step, without its ending."""
    return name.replace("/", "-").replace(" ", "-")


class Progress:
    """Items of one step: each is started, and then ok, failed, skipped or died. A step that came to its end says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def events(self) -> list[dict[str, str]]:
        """All so far; a line that was cut off is left out."""
        found = []
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def items(self) -> dict[str, tuple[str, str]]:
        """Of each item the last event and what was told; the event is "start" for the one that is on."""
        return {e["item"]: (e["event"], e["told"]) for e in self.events() if e["item"]}

    def on(self) -> list[str]:
        return [item for item, (event, _) in self.items().items() if event == "start"]

    def ended(self) -> tuple[str, str] | None:
        """Status and words of the step's end; None where it was not reached."""
        ends = [e for e in self.events() if not e["item"]]
        return (ends[-1]["event"], ends[-1]["told"]) if ends else None

    def reopen(self) -> None:
        """For another run in the same folder: what was cut off is as if it had not been started, and so is the end."""
        items = self.items()
        kept = [e for e in self.events() if e["item"] and items[e["item"]][0] not in ("start", "cut")]
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(event) + "\n" for event in kept))
        aside.replace(self.path)

    def start(self, item: str) -> None:
        self._write(item, "start", "")

    def done(self, item: str, event: str, told: str = "") -> None:
        self._write(item, event, told)

    def end(self, status: str, told: str) -> None:
        self._write("", status, told)

    def _write(self, item: str, event: str, told: str) -> None:
        line = json.dumps({"item": item, "event": event, "told": told[:1000]})
        with self.path.open("ab") as opened:
            if opened.tell() and not self._ends_in_newline():
                line = "\n" + line  # after a line that a killed process could not finish
            opened.write(line.encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())

    def _ends_in_newline(self) -> bool:
        with self.path.open("rb") as opened:
            opened.seek(-1, os.SEEK_END)
            return opened.read(1) == b"\n"
