"""What only a GPU can show: CUDA graphs hold every op, module and training step; other streams and devices are obeyed."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu.timings import captured
from slimkernels import elastic, hyper, nn
from slimkernels.models.resnet import CifarResNet
from slimkernels.train import sandwich_step
from tests.helpers import DEVICE, error

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
WIDTHS = [1.0, 0.5, 0.25]


def at(module, width):
    module.set_width(width)
    return module


def image(c):
    return torch.randn(4, c, 9, 9).contiguous(memory_format=torch.channels_last)


MODULES = {
    "linear": lambda: (at(nn.SlimLinear(64, 48), 33), torch.randn(20, 40)),
    "conv": lambda: (at(nn.SlimConv2d(64, 48, 3, padding=1), 33), image(40)),
    "conv, depthwise": lambda: (at(nn.SlimConv2d(64, 64, 3, groups=64), 40), image(40)),
    "conv, 1d": lambda: (at(nn.SlimConv1d(64, 48, 3), 33), torch.randn(4, 40, 30)),
    "conv, transposed": lambda: (at(nn.SlimConvTranspose2d(64, 48, 3, stride=2), 33), image(40)),
    "batch norm": lambda: (nn.SlimBatchNorm2d(64), image(40)),
    "group norm": lambda: (nn.SlimGroupNorm(8, 64), image(40)),
    "layer norm": lambda: (nn.SlimLayerNorm(64), torch.randn(20, 40)),
    "rms norm": lambda: (nn.SlimRMSNorm(64), torch.randn(20, 40)),
    "lstm": lambda: (at(nn.SlimLSTM(24, 32, 2, bidirectional=True), 20), torch.randn(7, 4, 24)),
    "gru": lambda: (at(nn.SlimGRU(24, 32), 20), torch.randn(7, 4, 24)),
}


def run(module, x):
    """Output and gradients, of x and of every parameter."""
    found = module(x)
    y = found if isinstance(found, torch.Tensor) else found[0]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("name", MODULES)
def test_a_graph_holds_forward_and_backward(name):
    module, x = MODULES[name]()
    x = x.requires_grad_()
    replay = captured(lambda: run(module, x))
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        for ours, expected in zip(replay(), run(module, x), strict=True):
            assert error(ours, expected) < 1e-5


def network():
    with torch.device("cpu"):
        return elastic.convert(CifarResNet(8, (8, 16, 24)), torch.randn(2, 3, 8, 8), widths=[0.25, 0.5, 1.0])


def test_a_graph_holds_generated_weights():
    generator = hyper.WeightGenerator(network()).to(DEVICE).eval()  # in training each call draws noise
    leaves = [p for p in generator.parameters() if p.requires_grad]

    def call():
        made = list(generator(0.5).values())
        return [*made, *torch.autograd.grad([t.square().sum() for t in made], leaves)]

    for ours, expected in zip(captured(call)(), call(), strict=True):
        assert error(ours, expected) < 1e-5


def test_a_graph_holds_a_sandwich_step():
    model = network().to(DEVICE)
    x, target = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        sandwich_step(model, (x, target), F.cross_entropy, optimizer, widths=WIDTHS, distill=None)

    replay = captured(step)
    before = [p.detach().clone() for p in model.parameters()]
    replay()
    torch.cuda.synchronize()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", [nn.SlimLSTM, nn.SlimGRU])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}])
def test_the_packed_slices_are_taken_as_they_lie(kind, options):
    """cuDNN's order: else PyTorch would copy them once more, and warn."""
    module = at(kind(24, 32, **options), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = module(torch.randn(7, 4, 24))
        y.sum().backward()


@pytest.mark.parametrize("name", MODULES)
def test_another_stream_is_obeyed(name):
    """On a stream of its own behind a long wait: a kernel on any other stream would read what is not yet written."""
    module, x = MODULES[name]()
    x = x.requires_grad_()
    expected = run(module, x)
    late = torch.empty_like(x).requires_grad_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            late.copy_(x)
        results = run(module, late)
    side.synchronize()
    for ours, other in zip(results, expected, strict=True):
        assert error(ours, other) < 1e-5


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", MODULES)
def test_another_device_is_obeyed(name):
    module, x = MODULES[name]()
    expected = run(module, x.requires_grad_())
    results = run(module.to("cuda:1"), x.detach().to("cuda:1").requires_grad_())
    assert torch.cuda.current_device() == 0
    for ours, other in zip(results, expected, strict=True):
        assert ours.device == torch.device("cuda:1")
        assert error(ours, other) < 1e-5
