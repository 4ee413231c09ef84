"""Every test runs with fresh memory poisoned and a fixed seed, on one thread unless it asks for more."""

import os

import pytest
import torch

from tests.helpers import DEVICE, TF32


@pytest.fixture(autouse=True)
def _default_device():
    """SLIMKERNELS_TEST_DEVICE=cuda: what a test makes without naming a device is on the GPU."""
    if DEVICE == "cpu":
        yield
        return
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory_and_seed():
    # Fills torch.empty and C++ at::empty with NaN: a kernel that forgets an element fails.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config):
    torch.set_num_threads(1)  # a shared 2-core machine loses whole scheduler ticks in OpenMP barriers
    if DEVICE != "cpu":
        # PyTorch's own default is tf32 in cuDNN and exact products elsewhere. The older switches: where the newer ones
        # are set for one op alone, PyTorch 2.11 cannot say what the older ones are, and torch.compile asks.
        torch.set_float32_matmul_precision("high" if TF32 else "highest")
        torch.backends.cudnn.allow_tf32 = TF32
        # Without it cuBLAS warns in each call of a deterministic run; some of PyTorch's own kernels always do.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation")
        # PyTorch's own recurrent layers, on slices, to which ours are compared. Of ours tests/ops/test_on_gpu.py asks it.
        config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of single contiguous chunk")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
