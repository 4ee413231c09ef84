"""What ``slimkernels info`` tells: what was built, what is in use, and why anything is off.

Nothing here initialises CUDA or imports Triton: asking must not take a GPU.
"""

import importlib.metadata
import inspect
import os
import platform
from pathlib import Path

import torch

from slimkernels import cuda_kernels, ops, triton_kernels
from slimkernels._extension import cpp_available, cpp_info, reason_missing
from slimkernels._version import __version__

Section = dict[str, str]

# What computes an op on a GPU where it is there, and what of it composes PyTorch all the same, beside float64.
ON_GPU = {
    "activation": ("PyTorch", ""),
    "inr_weights": (
        "CUDA C++",
        "more than 512 hidden units, 128 outputs or 24 bands; networks too large for a block's shared memory; activations"
        ' other than relu, elu, gelu and silu; save="full"',
    ),
    "slice_accumulate_": ("CUDA C++", "sources of more than 5 dimensions or that are not dense"),
    "slim_batch_norm": ("Triton", ""),
    "slim_conv": ("CUDA C++ (depthwise), Triton", "3d; 2^31 positions and more"),
    "slim_conv_transpose": ("Triton", "3d; 2^31 positions and more"),
    "slim_group_norm": ("Triton", ""),
    "slim_gru": ("cuDNN", "compiled layers on AMD"),
    "slim_layer_norm": ("Triton", "backward of rows of more than 4096"),
    "slim_linear": ("Triton", ""),
    "slim_lstm": ("cuDNN", "compiled layers on AMD"),
    "slim_rms_norm": ("Triton", "backward of rows of more than 4096"),
}


def collect() -> dict[str, Section]:
    """Section -> name -> what to tell."""
    return {
        "slimkernels": _package(),
        "CPU": _cpu(),
        "GPU": _gpu(),
        "ops on the CPU": _ops(),
        "ops on a GPU": _gpu_ops(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package() -> Section:
    found = {name: _version(name) or "not installed" for name in ("safetensors", "matplotlib", "tensorboard")}
    where = str(Path(ops.__file__).parent.parent)
    return {
        "version": __version__,
        "from": where,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    } | found


def _cpu() -> Section:
    capability = torch.backends.cpu.get_cpu_capability()
    section = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores seen, torch uses {torch.get_num_threads()} threads"
    }
    section["instruction set of torch"] = capability
    if not cpp_available():
        return section | {"C++ kernels": f"off: {reason_missing}; every op runs its PyTorch reference"}
    details = {f"C++ kernels, {key}": value for key, value in cpp_info().items() if key != "isa"}
    return section | {"C++ kernels": f"on, instruction set in use: {cpp_info()['isa']}"} | details


def _gpu() -> Section:
    section: Section = {}
    version = torch.version.cuda or getattr(torch.version, "hip", None)
    devices = Path("/proc/driver/nvidia/gpus")
    if version is None:
        section["torch"] = "off: this build of torch has no CUDA; install one that has, from pytorch.org"
    else:
        section["torch"] = f"built for CUDA {version}"
    try:
        count = len(list(devices.iterdir()))
        section["driver"] = f"{count} NVIDIA GPU{'s' if count != 1 else ''} seen"
    except OSError:
        section["driver"] = "no NVIDIA driver seen on this machine"
    triton = _version("triton")
    section["Triton"] = triton or "off: not installed ('pip install triton' on Linux)"
    reasons = {"Triton kernels": triton_kernels.reason_missing(), "CUDA kernels": cuda_kernels.reason_missing()}
    for name, reason in reasons.items():
        if reason:
            section[name] = f"off: {reason}; their ops on CUDA tensors run the PyTorch reference"
        else:
            section[name] = "installed, loaded at the first use of a CUDA tensor"
    return section


def _gpu_ops() -> Section:
    """Each op and what computes it for a CUDA tensor."""
    missing = {
        "CUDA C++": bool(cuda_kernels.reason_missing()),
        "Triton": bool(triton_kernels.reason_missing()),
        "PyTorch": False,
        "cuDNN": torch.version.cuda is None or os.environ.get("SLIMKERNELS_DISABLE") == "1",
    }
    section = {}
    for name, (kernels, composed) in ON_GPU.items():
        there = [each for each in kernels.split(", ") if not missing[each.partition(" (")[0]]]
        if there:
            section[name] = ", ".join(there) + (f"; in PyTorch: {composed}" if composed else "")
        else:
            section[name] = "PyTorch reference"
    return section


def _ops() -> Section:
    """Each op of the library and which implementation the dispatcher takes for a CPU tensor."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    section = {}
    for name in sorted(name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))):
        if not hasattr(torch.ops.slimkernels, name):
            section[name] = "composed of other ops"
        elif has_kernel(f"slimkernels::{name}", "CPU"):
            section[name] = "C++"
        else:
            section[name] = "PyTorch reference"
    return section
