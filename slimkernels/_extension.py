"""Loads the compiled CPU kernels, if they were built, and says why when they were not.

``SLIMKERNELS_DISABLE=1`` leaves them out, so that every op runs its PyTorch reference (for bisecting).
"""

import importlib
import os
from types import ModuleType


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("SLIMKERNELS_DISABLE") == "1":
        return None, "switched off by SLIMKERNELS_DISABLE=1"
    try:
        return importlib.import_module("slimkernels._C"), ""
    except ModuleNotFoundError:
        return None, "not built (install with a C++ compiler and without SLIMKERNELS_CPP=0)"
    except ImportError as error:
        return (
            None,
            f"built for another torch or machine ({error}); reinstall with 'pip install --no-build-isolation .'",
        )


_C, reason_missing = _load()


def cpp_available() -> bool:
    """True when the C++ CPU kernels are loaded."""
    return _C is not None


def empty_cache() -> None:
    """Give back the memory that recurrent layers on the CPU keep from call to call: of training steps up to 256 MiB, and as
    much of packed weights. The next calls take and fill it anew. What ``elastic.deploy`` packed stays, as it has a bound of
    its own and goes with the deployed network.
    """
    if _C is not None:
        _C.empty_cache()


def cpp_info() -> dict[str, str]:
    """Compiler, torch version and instruction set of the C++ kernels, or ``{"missing": reason}``."""
    if _C is None:
        return {"missing": reason_missing}
    return {"isa": _C.isa()} | {key: str(value) for key, value in _C.build_info().items()}
