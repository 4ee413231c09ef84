"""A trainer that knows the CPU seconds it took, interruptions included."""

import time
from typing import Any

from slimkernels import train


class Clocked(train.Trainer):
    """Keeps the CPU seconds of the training in its checkpoints."""

    seconds_before = 0.0
    started = 0.0

    def fit(self, **options: Any) -> Any:
        self.started = time.process_time()
        return super().fit(**options)

    @property
    def cpu_seconds(self) -> float:
        return self.seconds_before + time.process_time() - self.started

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "cpu_seconds": self.cpu_seconds}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.seconds_before, self.started = state["cpu_seconds"], time.process_time()
