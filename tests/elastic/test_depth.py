"""Elastic depth: which stages are found, what a depth means, and that it is the same everywhere."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import slimkernels
from slimkernels import elastic, models
from tests.elastic.nets import NETS, build
from tests.helpers import error

STAGES = {
    "resnet20": {f"layer{i}": 3 for i in (1, 2, 3)},
    "resnet50": {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3},
    "mobilenet_v2": {"features.2": 2, "features.4": 3, "features.7": 4, "features.11": 3, "features.14": 3},
    "convnext": {"features.5": 2},
    "vit": {"blocks": 2},
}


class Residual(nn.Module):
    def __init__(self, n: int, m: int | None = None):
        super().__init__()
        self.a, self.b = nn.Linear(n, 2 * n), nn.Linear(2 * n, m or n)
        self.skip = nn.Identity() if m in (None, n) else nn.Linear(n, m)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.b(self.a(x).relu())


class Loop(nn.Module):
    """A ModuleList whose forward counts on every block being there, or not."""

    def __init__(self, strict: bool):
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.blocks = nn.ModuleList(Residual(16) for _ in range(4))
        self.last = nn.Linear(16, 3)
        self.strict = strict

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in zip(range(4), self.blocks, strict=self.strict):
            x = block(x)
            assert 0 <= i < 4
        return self.last(x)


def converted(name: str, **kwargs):
    net, x = build(name)
    return net, elastic.convert(net, x, **({"divisor": 4, "depth": True} | kwargs)), x


@pytest.fixture(scope="module")
def resnet():
    return converted("resnet20")


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_stages_are_found_and_every_depth_is_the_extracted_network(name):
    net, model, x = converted(name)
    stages = elastic.plan(model).stages
    assert {stage: len(found.blocks) for stage, found in stages.items()} == STAGES[name]
    assert list(net.state_dict()) == [k for k in model.state_dict() if ".calibrated." not in k]
    assert error(model(x), net(x)) < 2e-5
    for depth in (1.0, 0.5, {next(reversed(stages)): 1}):
        for width in (1.0, 0.5):
            with elastic.width(model, width, depth=depth):
                y = model(x)
            sub = elastic.extract(model, width, depth)
            assert error(sub(x), y) < 1e-5
            assert not any(type(m).__module__.startswith("slimkernels.elastic") for m in sub.modules())
            assert elastic.cost(model, width, depth).params == sum(p.numel() for p in sub.parameters())


@torch.no_grad()
def test_band_split_rnn():
    torch.manual_seed(0)
    net = models.bsrnn.BSRNN(features=16, hidden=16, layers=3, bands=[4, 4, 8], channels=1).eval()
    x = torch.randn(1, 5, 32)
    model = elastic.convert(net, x, depth=True)
    assert list(elastic.plan(model).stages) == ["blocks"]
    for depth in (1.0, {"blocks": 1}):
        with elastic.width(model, 0.5, depth=depth):
            y = model(x)
        sub = elastic.extract(model, 0.5, depth)
        assert error(sub(x), y) < 1e-5
        assert sum(p.numel() for p in sub.parameters()) == elastic.cost(model, 0.5, depth).params


@torch.no_grad()
def test_a_skipped_block_runs_nothing(resnet):
    _, model, x = resnet
    block = model.layer2[1]
    ran = []
    handle = block.conv1.register_forward_hook(lambda *_: ran.append(1))
    with elastic.width(model, 1.0, depth={"layer2": 1}):
        model(x)
        assert not ran
        assert torch.equal(block(x), x)
    model(x)
    handle.remove()
    assert ran


@torch.no_grad()
def test_a_network_built_so_loads_the_extracted_weights():
    torch.manual_seed(0)
    net = models.ResNet(models.resnet.BasicBlock, (3, 3, 1, 1), (8, 16, 16, 16), classes=4).eval()
    x = torch.randn(1, 3, 32, 32)
    model = elastic.convert(net, x, depth=True, divisor=4)
    sub = elastic.extract(model, 1.0, {"layer1": 2, "layer2": 1})
    built = models.ResNet(models.resnet.BasicBlock, (2, 1, 1, 1), (8, 16, 16, 16), classes=4).eval()
    built.load_state_dict(sub.state_dict())
    assert torch.equal(built(x), sub(x))
    flat = nn.Sequential(nn.Linear(6, 16), *(Residual(16) for _ in range(3)), nn.ReLU(), nn.Linear(16, 2))
    y = torch.randn(3, 6)
    sub = elastic.extract(elastic.convert(flat, y, depth=True), 1.0, 0.3)
    smaller = nn.Sequential(nn.Linear(6, 16), Residual(16), nn.ReLU(), nn.Linear(16, 2))
    smaller.load_state_dict(sub.state_dict())
    assert torch.equal(smaller(y), sub(y))


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_module_list_and_a_forward_that_counts_its_blocks(strict):
    model = elastic.convert(Loop(strict), x := torch.randn(2, 5), depth=True)
    assert elastic.plan(model).stages["blocks"].removable is not strict
    with elastic.width(model, 0.5, depth=0.5):
        y = model(x)
    sub = elastic.extract(model, 0.5, 0.5)
    assert error(sub(x), y) < 1e-6
    assert len(sub.blocks) == (4 if strict else 2)
    assert sum(p.numel() for p in sub.parameters()) == elastic.cost(model, 0.5, 0.5).params


def test_what_is_no_residual_block_is_no_stage():
    plain = nn.Sequential(
        nn.Linear(4, 16), *(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)), nn.Linear(16, 2)
    )
    with pytest.raises(ValueError, match=r"expected a model with stages of residual blocks for depth=True, got Seq"):
        elastic.convert(plain, torch.randn(2, 4), depth=True)


def test_a_change_of_shape_starts_a_stage_and_ignored_blocks_always_run():
    def make():
        return nn.Sequential(
            nn.Linear(4, 16), Residual(16), Residual(16), Residual(16, 24), Residual(24), Residual(24), nn.Linear(24, 2)
        )

    x = torch.randn(2, 4)
    stages = elastic.plan(elastic.convert(make(), x, depth=True)).stages
    assert {name: s.blocks for name, s in stages.items()} == {"1": ("1", "2"), "3": ("3", "4", "5")}
    stages = elastic.plan(elastic.convert(make(), x, depth=True, ignore=["4"])).stages
    assert {name: s.blocks for name, s in stages.items()} == {"1": ("1", "2"), "4": ("4", "5")}


class Tapped(nn.Module):
    """The output of every block is used: the network does not run with fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(Residual(16) for _ in range(3))
        self.free = nn.Sequential(Residual(16), Residual(16))
        self.last = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.free(self.first(x)), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        if any(a is b for a, b in itertools.pairwise(kept)):
            raise RuntimeError("every block has to run")
        return self.last(torch.cat(kept, -1))


def test_a_stage_that_cannot_be_skipped_is_left_alone_and_reported():
    model = elastic.convert(Tapped(), torch.randn(2, 4), depth=True)
    assert list(elastic.plan(model).stages) == ["free"]
    text = str(elastic.report(model))
    assert (
        "the depth of blocks stays: the network does not run without its blocks (RuntimeError: every block has to run)"
        in text
    )
    assert "1 stages of elastic depth" in text


def test_wrong_depths_are_named_and_change_nothing(resnet):
    _, model, x = resnet
    before = model(x)
    for depth, text in [
        (1, "expected depth to be a float in .0, 1. or a dict of blocks by stage, got 1"),
        (0.0, "expected depth to be a float in"),
        (1.5, "expected depth to be a float in"),
        ({"layer1": 4}, "expected depth of 'layer1' to be 1 to 3 blocks, or a float in .0, 1., got 4"),
        ({"layer1": 0}, "expected depth of 'layer1' to be 1 to 3 blocks"),
        ({"layer9": 1}, "expected the name of a stage .globs allowed., got 'layer9'; there are layer1, layer2, layer3"),
    ]:
        with pytest.raises(ValueError, match=text):
            elastic.set_width(model, 0.5, depth)
    assert torch.equal(model(x), before)
    net, x = build("resnet20")
    with pytest.raises(ValueError, match=r"the model has no elastic depth .convert with depth=True., got 0\.5"):
        elastic.set_width(elastic.convert(net, x), 0.5, 0.5)


def test_meaning_nesting_and_restoring(resnet):
    _, model, x = resnet
    known = elastic.plan(model)
    assert known.depths("", 0.5) == dict.fromkeys(known.stages, 2)
    assert known.depths("", 0.1) == dict.fromkeys(known.stages, 1)
    assert known.depths("", {"layer*": 2, "layer3": 0.3}) == {"layer1": 2, "layer2": 2, "layer3": 1}
    full = model(x)
    with elastic.width(model, 0.5, depth=0.5):
        half = model(x)
        with elastic.width(model, 0.5, depth={"layer1": 1}):
            assert not torch.equal(model(x), half)
        assert torch.equal(model(x), half)
        with elastic.width(model, 0.5):
            assert known.skipped("", known.current_depth) == set()
        copied = copy.deepcopy(model)
    assert torch.equal(copied(x), half)
    assert torch.equal(model(x), full)


@pytest.mark.parametrize("name", ["resnet20", "convnext"])
@torch.no_grad()
def test_view_copy_pickle_save_and_load(name, tmp_path):
    _, model, x = converted(name)
    expected = {}
    for depth in (None, 0.3):
        with elastic.width(model, 0.5, depth):
            expected[depth] = model(x)
        assert torch.equal(elastic.view(model, 0.5, depth)(x), expected[depth])
    again = pickle.loads(pickle.dumps(model))
    path = tmp_path / "net.safetensors"
    elastic.save(model, path)
    loaded = elastic.load(path, NETS[name][0]().eval())
    for other in (again, loaded, copy.deepcopy(model)):
        for depth, y in expected.items():
            with elastic.width(other, 0.5, depth):
                assert torch.equal(other(x), y)
            assert elastic.cost(other, 0.5, depth) == elastic.cost(model, 0.5, depth)
    assert str(elastic.report(loaded)) == str(elastic.report(model))


@torch.no_grad()
def test_calibrate_measures_the_networks_of_a_depth():
    _, model, x = converted("resnet20")
    batches = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    elastic.calibrate(model, batches, [0.5], depth=0.3)
    sub = elastic.extract(model, 0.5, 0.3)
    for module in sub.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    again = copy.deepcopy(sub).train()
    for batch in batches:
        again(batch)
    assert error(elastic.extract(model, 0.5, 0.3)(x), again.eval()(x)) < 1e-3
    assert elastic.plan(model).current_depth is None
    with pytest.raises(ValueError, match="calibrate: expected depth to be a float"):
        elastic.calibrate(model, batches, [0.5], depth=2.0)


def test_only_blocks_that_run_get_gradients():
    _, model, x = converted("resnet20")
    model.train()
    with elastic.width(model, 0.5, depth={"layer1": 1}):
        model(x).square().sum().backward()
    assert model.layer1[0].conv1.weight.grad is not None
    assert model.layer1[1].conv1.weight.grad is None
    assert model.layer2[1].conv1.weight.grad is not None


def test_compiled_model_has_one_graph_more_for_each_depth():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), *(Residual(64) for _ in range(3)), nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(3, 6)
    model = elastic.convert(net, x, depth=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = slimkernels.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for depth in (1.0, {"1": 2}, {"1": 1}):
            for width in (1.0, 0.5, 0.25, 0.75, 0.4, 0.9):
                with elastic.width(compiled, width, depth=depth):
                    assert error(compiled(x), model(x)) < 1e-6
    assert counter.frame_count <= 3 * 3
