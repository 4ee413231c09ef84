"""Ctrl-C as a request to stop after the current step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Notes the first Ctrl-C; the second one raises KeyboardInterrupt at once.

    Args:
        said: called with a sentence for the person who pressed it.
    """

    def __init__(self, said: Callable[[str], None]) -> None:
        self.said, self.pressed = said, False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Ctrl-C is handled like this inside, and as before on leaving. Outside the main thread nothing changes."""
        self.pressed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.pressed:
                raise KeyboardInterrupt
            self.pressed = True
            self.said("Stopping after this step (Ctrl-C again stops at once, without a checkpoint).")

        previous = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
