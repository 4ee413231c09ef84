"""The switch between tf32 and exact float32 products is torch's."""

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SWITCHES = {
    "": "ieee tf32 ieee",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32 tf32 ieee",
    "torch.backends.cudnn.allow_tf32 = False": "ieee ieee ieee",
    "torch.set_float32_matmul_precision('high')": "tf32 tf32 ieee",
    "torch.backends.fp32_precision = 'tf32'": "tf32 tf32 ieee",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'": "ieee ieee ieee",
}

# A process for each: the switches of torch cannot all be taken back.
EACH = """
import os, sys, torch
from slimkernels.triton_kernels._common import conv_precision, matmul_precision
for switch in sys.argv[1:]:
    if os.fork() == 0:
        exec(switch)
        print(matmul_precision(torch.float32), conv_precision(torch.float32), matmul_precision(torch.bfloat16), flush=True)
        os._exit(0)
    os.wait()
"""


def test_products_follow_the_switches_of_torch():
    run = subprocess.run([sys.executable, "-c", EACH, *SWITCHES], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == list(SWITCHES.values())
