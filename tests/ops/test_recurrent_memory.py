"""What recurrent layers keep for backward is memory that the steps before gave back."""

import os
import subprocess
import sys

import pytest
import torch

from slimkernels._extension import cpp_available

PIECE = 32 << 20  # bytes of the gates below; less is left to the C heap
STEPS, BATCH, HIDDEN = 128, 128, 128

pytestmark = pytest.mark.skipif(not cpp_available(), reason="the reference keeps tensors of PyTorch's")


def kept():
    """Gates of a forward pass."""
    weights = [torch.randn(4 * HIDDEN, 8), torch.randn(4 * HIDDEN, HIDDEN)]
    x = torch.randn(STEPS, BATCH, 8)
    return torch.ops.slimkernels.slim_lstm(x, None, None, weights, None, False, HIDDEN, 0, 1, True)[3]


def test_memory_given_back_is_taken_again():
    gates = kept()
    assert gates.nbytes == PIECE
    before = gates.data_ptr()
    del gates
    gates = kept()
    assert gates.data_ptr() == before


def test_memory_in_use_is_not_taken():
    first, second = kept(), kept()
    values = first.clone()
    third = kept()
    assert len({t.data_ptr() for t in (first, second, third)}) == 3
    assert torch.equal(values, first)


def test_empty_cache_gives_spare_memory_and_packed_weights_back():
    code = (
        "import torch, resource, slimkernels\n"
        "from slimkernels.nn import SlimLSTM\n"
        "from tests.ops.test_recurrent_memory import kept\n"
        "layer, x = SlimLSTM(512, 512, num_layers=4).eval(), torch.randn(1, 1, 512)\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20\n"
        "with torch.no_grad():\n"
        "    expected = layer(x)[0]\n"
        "held = [kept() for _ in range(4)]\n"
        "del held\n"
        "before = resident()\n"
        "slimkernels.empty_cache()\n"
        "after = resident()\n"
        "assert before - after > 140, (before, after)\n"  # 4 times 32 MiB of gates, 32 of packed weights
        "with torch.no_grad():\n"
        "    assert torch.equal(layer(x)[0], expected)\n"
        "slimkernels.empty_cache()\n"
        "slimkernels.empty_cache()\n"
        "assert kept().isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_spare_memory_is_bounded():
    code = (
        "import torch, resource\n"
        "from tests.ops.test_recurrent_memory import kept\n"
        "kept()\n"
        "held = [kept() for _ in range(13)]\n"  # 416 MiB, 160 more than may stay
        "del held\n"
        "now = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "assert peak - now > 120 << 20, (peak >> 20, now >> 20)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_profiler_counts_memory_taken_again():
    kept()
    with torch.profiler.profile(profile_memory=True) as profile:
        kept()
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    large = [n for n in changes if abs(n) >= PIECE]
    assert len(large) == 2
    assert large[0] == -large[1] > 0
