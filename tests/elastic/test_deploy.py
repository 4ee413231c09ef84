"""The inference form of every network, against what ``extract`` gives, and what its cache does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from slimkernels import elastic, models
from slimkernels._extension import _C, cpp_available
from tests.elastic.nets import NETS, build
from tests.helpers import FLOOR, error

AUDIO = {
    "nsnet2": (lambda: models.NSNet2(24, 32), (2, 4, 161)),
    "bsrnn": (lambda: models.BSRNN(16, 12, 2, bands=[4, 8], channels=1), (1, 5, 24)),
}
WIDTHS = (1.0, 0.7, 0.5, 0.31, 0.25)


def elastic_net(name: str, **kwargs):
    if name in AUDIO:
        torch.manual_seed(0)
        make, shape = AUDIO[name]
        net, x = make().eval(), torch.randn(shape)
    else:
        net, x = build(name)
    return elastic.convert(net, x, **({"divisor": 1} | kwargs)), x


def check_like_extracted(deployed, model, x, width, depth=None, dtype=torch.float32):
    """Error against float64 at most twice the plain network's."""
    plain = elastic.extract(model, width, depth).eval()
    exact = copy.deepcopy(plain).double()(x.double())
    torchs = plain.to(dtype)(x.to(dtype))
    deployed.set_width(width, depth)
    ours = deployed(x)
    assert ours.dtype == dtype
    assert error(ours, exact) <= 2 * error(torchs, exact) + FLOOR[dtype]
    return ours


@pytest.mark.parametrize("name", [*NETS, *AUDIO])
@torch.no_grad()
def test_computes_what_the_extracted_network_does(name):
    model, x = elastic_net(name)
    deployed = elastic.deploy(model)
    groups = list(elastic.plan(model).groups)
    for width in (*WIDTHS, {groups[0]: 0.4, groups[-1]: 0.3}):
        check_like_extracted(deployed, model, x, width)
    larger = torch.cat([x, x.roll(1, -1)])  # another shape on the same packed weights
    check_like_extracted(deployed, model, larger, 0.5)


@pytest.mark.parametrize("name", [*NETS, *AUDIO])
@torch.no_grad()
def test_bfloat16(name):
    if _C is not None and not _C.deploy_has_bfloat16():
        with pytest.raises(RuntimeError, match=r"deploy: this machine has no bfloat16 products \(AVX512-BF16\)"):
            elastic.deploy(elastic_net(name)[0], dtype=torch.bfloat16)
        return
    model, x = elastic_net(name)
    deployed = elastic.deploy(model, dtype=torch.bfloat16)
    for width in (1.0, 0.31):
        check_like_extracted(deployed, model, x, width, dtype=torch.bfloat16)


@torch.no_grad()
def test_inputs_in_any_layout_and_batch():
    model, x = elastic_net("resnet20")
    deployed = elastic.deploy(model, widths=[0.5])
    expected = deployed(x)
    assert error(deployed(x.to(memory_format=torch.channels_last)), expected) < 1e-6
    assert error(deployed(x.repeat(1, 1, 1, 2)[..., :16]), expected) < 1e-6
    assert error(deployed(x[:1]), expected[:1]) < 1e-6
    for size in (1, 7, 33):
        check_like_extracted(deployed, model, torch.randn(1, 3, size, 16), 0.5)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, mask=None, twice=False, scale=1.0):
        h = self.a(x).relu()
        if mask is not None:
            h = h * mask
        return self.b(h) * scale * (2 if twice else 1)


@torch.no_grad()
def test_optional_arguments():
    x, mask = torch.randn(4, 5), torch.rand(4, 1)
    model = elastic.convert(Optional().eval(), x, divisor=1)
    deployed = elastic.deploy(model, widths=[0.5])
    plain = elastic.extract(model, 0.5)
    calls = [((x,), {}), ((x, mask), {}), ((x,), {"mask": mask, "scale": 0.5}), ((x, None), {}), ((x,), {})]
    for args, kwargs in calls:
        assert error(deployed(*args, **kwargs), plain(*args, **kwargs)) < 1e-6
    assert not deployed.report.stopped
    assert error(deployed(x, twice=True), plain(x, twice=True)) < 1e-6


@torch.no_grad()
def test_results_are_fresh_tensors():
    model, x = elastic_net("unet")
    deployed = elastic.deploy(model)
    first = deployed(x)
    kept, given = first.clone(), x.clone()
    deployed(torch.randn_like(x))
    assert torch.equal(first, kept)
    assert torch.equal(x, given)


class Details(nn.Module):
    """What rewriting can get wrong: in-place operations, shared values, broadcasts, biases before a norm."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 12, (5, 3), stride=(2, 1), padding=(2, 1), groups=12)
        self.c = nn.Conv2d(12, 8, 3, padding="same", groups=4)
        self.d = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.act = nn.Hardswish(inplace=True)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.fc = nn.Linear(8 * 12, 7)

    def forward(self, x):
        x = self.norm(self.a(x))
        y = self.act(x)  # x is changed too
        y = self.b(y + x).relu_()
        z = torch.tanh(self.c(y))
        z = self.d(z) + self.gate(self.d(z))  # a broadcast addition
        z = nn.functional.gelu(self.up_norm(self.up(z)) * self.scale + self.scale)
        z = self.pool(self.mirrored(z))
        z += z
        return self.fc(nn.functional.adaptive_avg_pool2d(z, (3, 4)).view(z.shape[0], -1)), z


@torch.no_grad()
def test_details_of_a_users_network():
    net, x = Details().eval(), torch.randn(2, 3, 13, 9)
    for buffer in net.buffers():
        buffer.add_(torch.rand_like(buffer.float()).to(buffer.dtype))
    model = elastic.convert(net, x, divisor=1)
    for dtype in (torch.float32, torch.float64):
        deployed = elastic.deploy(model, dtype=dtype)
        for width in (1.0, 0.5):
            deployed.set_width(width)
            for ours, plain in zip(deployed(x), elastic.extract(model, width)(x), strict=True):
                assert error(ours, plain) < 2e-6
    broadcast = {layer.operation for layer in elastic.deploy(model).report.layers}
    assert any("batch norm" in operation for operation in broadcast)


@torch.no_grad()
def test_a_stream_of_blocks():
    net, x = models.WaveNet(8, (1, 2, 4)).eval(), torch.randn(2, 1, 60)
    model = elastic.convert(net, x, divisor=1)
    deployed, whole = elastic.deploy(model, method="stream"), elastic.deploy(model)
    for width in (1.0, 0.5):
        deployed.set_width(width)
        whole.set_width(width)
        plain = elastic.extract(model, width).eval()
        expected = plain(x)
        assert error(whole(x), expected) < 1e-6
        past, heard = plain.silence(x), []
        for block in x.split([20, 7, 33], -1):
            y, past = deployed(block, past)
            heard.append(y)
        assert error(torch.cat(heard, -1), expected) < 1e-6
    if cpp_available():
        assert len({layer.segment for layer in deployed.report.layers}) == 1


class Lines(nn.Module):
    """1d, with a norm, pooling and channels that are put together."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 4, stride=2)
        self.conv = nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.norm = nn.BatchNorm1d(8)
        self.down, self.mean = nn.MaxPool1d(3, stride=2, padding=1), nn.AvgPool1d(2)
        self.up = nn.ConvTranspose1d(16, 8, 2, stride=2)
        self.fc, self.fc_norm, self.last = nn.Linear(8, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)

    def forward(self, x):
        x = self.first(x)
        x = self.up(torch.cat([self.down(self.norm(self.conv(x)).tanh() + x), self.mean(x)], dim=1))
        x = torch.flatten(nn.functional.adaptive_avg_pool1d(x, 1), 1)
        return self.last(nn.functional.silu(self.fc_norm(self.fc(x))))


@torch.no_grad()
def test_one_dimension():
    net, x = Lines().eval(), torch.randn(2, 3, 42)
    model = elastic.convert(net, x, divisor=1)
    deployed = elastic.deploy(model)
    for width in (1.0, 0.5):
        check_like_extracted(deployed, model, x, width)
    if cpp_available():
        assert len({layer.segment for layer in deployed.report.layers}) == 1


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.back = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        y = self.back(self.fc(x).relu())
        if y.sum() > 1e9:
            return -y
        return y


class HoldsBranching(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.out = nn.Linear(5, 8), Branching(), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.inner(self.enter(x).relu()))


@torch.no_grad()
def test_what_cannot_be_traced_runs_as_it_is_and_is_named():
    x = torch.randn(4, 5)
    model = elastic.convert(HoldsBranching().eval(), x, divisor=1)
    deployed = elastic.deploy(model)
    for width in (1.0, 0.5):
        check_like_extracted(deployed, model, x, width)
    stopped = deployed.report.stopped
    assert list(stopped) == ["inner"]
    assert "test_deploy.py" in stopped["inner"]
    assert "if y.sum() > 1e9:" in stopped["inner"]
    assert "inner is not traced, what it calls is deployed by itself" in str(deployed.report)
    x = torch.randn(4, 8)
    model = elastic.convert(Branching().eval(), x)
    deployed = elastic.deploy(model)
    assert list(deployed.report.stopped) == [""]
    assert error(deployed(x), model(x)) < 1e-6


class PackedGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(6, 16, bidirectional=True), nn.Linear(32, 5)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([2, 5, 4]), enforce_sorted=False)
        return self.out(pad_packed_sequence(self.rnn(packed)[0])[0])


@torch.no_grad()
def test_packed_sequences():
    x = torch.randn(5, 3, 6)
    model = elastic.convert(PackedGRU().eval(), x, divisor=1)
    deployed = elastic.deploy(model)
    for width in (1.0, 0.5):
        check_like_extracted(deployed, model, x, width)


@torch.no_grad()
def test_depth():
    net, x = build("resnet20")
    model = elastic.convert(net, x, divisor=4, depth=True)
    deployed = elastic.deploy(model, widths=[(0.5, 0.4), 1.0])
    assert len(deployed.cached) == 2
    assert (deployed.width, deployed.depth) == (0.5, 0.4)
    stage = next(iter(elastic.plan(model).stages))
    for width, depth in [(0.5, 0.4), (1.0, None), (0.5, {stage: 2}), (0.7, 1.0)]:
        check_like_extracted(deployed, model, x, width, depth)
    shallow = len(elastic.deploy(model, widths=[(1.0, 0.3)]).report.layers)
    assert shallow < len(elastic.deploy(model).report.layers)


@torch.no_grad()
def test_gradients_and_modes_stay_out():
    model, x = elastic_net("resnet20")
    before = copy.deepcopy(model.state_dict())
    deployed = elastic.deploy(model).train()
    assert not deployed.training
    with torch.enable_grad():
        assert not deployed(x).requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert elastic.plan(model).current == 1.0


def test_report():
    model, x = elastic_net("resnet20")
    deployed = elastic.deploy(model)
    deployed(x)
    report = deployed.report
    text = str(report)
    first = report.layers[0]
    assert (first.name, first.operation) == ("conv1", "conv + batch norm + relu")
    assert any(layer.operation == "conv + batch norm + add + relu" for layer in report.layers)
    assert "layer1.0.conv1" in text
    assert report.modules == []
    if cpp_available():
        assert "tile of" in first.runs_on
        times = deployed.profile(x, repeats=3)
        assert sum(t.flops for t in times) == 2 * elastic.cost(model, 1.0).macs
        assert all(t.seconds > 0 and t.bytes >= 0 for t in times)
    else:
        with pytest.raises(RuntimeError, match=r"deploy: expected the C\+\+ kernels to time their operations"):
            deployed.profile(x)
    other, x = elastic_net("vit")
    deployed = elastic.deploy(other)
    deployed(x)
    assert "blocks.0.norm1" in deployed.report.modules


def test_errors():
    model, x = elastic_net("resnet20", widths=(0.25, 1.0))
    with pytest.raises(ValueError, match=r"expected a model made by elastic\.convert, got a plain Linear"):
        elastic.deploy(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"deploy: expected dtype to be floating point, got torch\.int8"):
        elastic.deploy(model, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"deploy: expected max_cache_bytes of at least 1, got 0"):
        elastic.deploy(model, max_cache_bytes=0)
    with pytest.raises(
        ValueError, match=r"deploy: expected max_cache_bytes of at least \d+, what the weights at width 1"
    ):
        elastic.deploy(model, max_cache_bytes=1000)
    with pytest.raises(ValueError, match=r"deploy: expected the name of a method of CifarResNet, got 'nothing'"):
        elastic.deploy(model, method="nothing")
    deployed = elastic.deploy(model)
    with pytest.raises(ValueError, match=r"expected width between 0\.25 and 1, got 0\.1"):
        deployed.set_width(0.1)
    with pytest.raises(ValueError, match=r"expected no depth but 1\.0"):
        deployed.set_width(0.5, 0.5)
    assert deployed.width == 1.0
    with pytest.raises((ValueError, RuntimeError), match=r"channels"):
        deployed(torch.randn(1, 4, 16, 16))
    if cpp_available():
        with pytest.raises(ValueError, match=r"deploy: expected an input of 4 dimensions, got shape \[5\]"):
            deployed(torch.randn(5))
    assert deployed(x).shape == (2, 10)
