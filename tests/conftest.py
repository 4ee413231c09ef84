"""Every test runs with fresh memory poisoned and a fixed seed, on one thread unless it asks for more."""

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
    if DEVICE != "cpu":  # PyTorch's own default is tf32 in cuDNN and exact products elsewhere
        precision = "tf32" if TF32 else "ieee"
        for switch in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            switch.fp32_precision = precision
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
