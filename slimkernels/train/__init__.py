"""Training: the sandwich step for any loop, and trainers with checkpoints and exact resume."""

from slimkernels.train.checkpoint import CheckpointError, CheckpointStore
from slimkernels.train.evaluate import accuracy, evaluate
from slimkernels.train.hypernet import HypernetTrainer
from slimkernels.train.loop import Trainer, TrainingError
from slimkernels.train.slimmable import SlimmableTrainer
from slimkernels.train.step import sandwich_step
from slimkernels.train.widths import WidthSampler

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "HypernetTrainer",
    "SlimmableTrainer",
    "Trainer",
    "TrainingError",
    "WidthSampler",
    "accuracy",
    "evaluate",
    "sandwich_step",
]
