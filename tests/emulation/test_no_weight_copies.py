"""No launcher copies a weight, of any op, forward or backward; what has to be packed for cuDNN is counted elsewhere.

The ops that each problem of ``test_graph_capture.py`` calls are replayed on ``meta``, and every call of PyTorch is watched
that reads the storage of a weight.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimkernels import nn as slim
from tests.emulation import test_graph_capture as graphs
from tests.helpers import tensors_in

COPIES = (
    "copy_",
    "clone",
    "_to_copy",
    "contiguous",
    "index",
    "index_select",
    "gather",
    "cat",
    "_reshape_copy",
    "_pack",
)
PROBLEMS = {
    name: make for name, make in graphs.PROBLEMS.items() if name not in ("generated weights", "slice_accumulate_")
}
PROBLEMS["conv in groups"] = lambda: graphs.train(
    graphs.at(slim.SlimConv2d(16, 12, 3, groups=4), 6), graphs.image(8, 6, 6)
)
PROBLEMS["conv 1d"] = lambda: graphs.train(graphs.at(slim.SlimConv1d(16, 12, 3), 7), torch.randn(2, 9, 8))
fake_gpu = graphs.fake_gpu


class Reads(TorchDispatchMode):
    """Copies of what lies in the storage of one of ``weights``."""

    def __init__(self, weights):
        super().__init__()
        self.storages = {w.untyped_storage()._cdata for w in weights}
        self.copies = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        sources = tensors_in(args[1:] if name == "copy_" else args)
        if name in COPIES and any(t.untyped_storage()._cdata in self.storages for t in sources):
            self.copies.append(name)
        return func(*args, **(kwargs or {}))


def weights_of(name, args):
    """The arguments that the op's schema calls weight or weights."""
    schema = getattr(torch.ops.slimkernels, name).default._schema
    named = zip(schema.arguments, args, strict=False)
    return tensors_in([value for argument, value in named if argument.name in ("weight", "weights")])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_launcher_copies_a_weight(problem, request):
    calls = PROBLEMS[problem]()
    assert any(weights_of(*call) for call in calls)
    request.getfixturevalue("fake_gpu")
    for name, args in calls:
        given = graphs.on_gpu(args)
        with Reads(weights_of(name, given)) as reads:

            def run(name=name, given=given):
                assert any(launcher(*given) is not NotImplemented for launcher in graphs.launchers(name))

            graphs.capture(run)
        assert reads.copies == [], name


def test_a_copy_is_found():
    weight = torch.empty(8, 6, device="meta")
    with Reads([weight]) as reads:
        weight[:4, :3].contiguous()
        weight.t().reshape(-1)
        weight.bfloat16()
        torch.empty(8, 6, device="meta").copy_(weight)
        weight[:4].t()
    assert reads.copies == ["clone", "clone", "_to_copy", "copy_"]
