"""Generate the weights of a network at any width from small coordinate networks, and prepare networks for it."""

from slimkernels.hyper.batch_norm import Scale, fold_batch_norm, replace_batch_norm
from slimkernels.hyper.generator import WeightGenerator
from slimkernels.hyper.initial import match_outputs, reconstruct
from slimkernels.hyper.permutation import Permutation, smooth_permutation
from slimkernels.hyper.published import load_published

__all__ = [
    "Permutation",
    "Scale",
    "WeightGenerator",
    "fold_batch_norm",
    "load_published",
    "match_outputs",
    "reconstruct",
    "replace_batch_norm",
    "smooth_permutation",
]
