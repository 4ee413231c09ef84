"""``nn.MultiheadAttention`` inside of elastic networks, and torch's transformer layers around it."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slimkernels import elastic, train
from slimkernels.nn import AnySizeMultiheadAttention, SlimMultiheadAttention
from tests.elastic.attention_nets import NETS, STEPS, D, H, ViT, ViTBlock, attend, one
from tests.elastic.handwritten_forwards import Net
from tests.elastic.nets import perturbed
from tests.helpers import error

WIDTHS = (1.0, 0.75, 0.5, 0.4, 0.25)


def build(name):
    make, shape, groups = NETS[name]
    return *perturbed(make, shape), groups


def attentions(net):
    return [m for m in net.modules() if isinstance(m, nn.MultiheadAttention)]


@pytest.mark.parametrize("name", NETS)
def test_full_width_is_the_network(name):
    net, x, groups = build(name)
    model = elastic.convert(net, x, divisor=4, sort=None)
    assert set(elastic.plan(model).groups) == groups
    assert not elastic.report(model).left_alone
    assert all(isinstance(m, SlimMultiheadAttention) for m in attentions(model))
    assert model.state_dict().keys() == net.state_dict().keys()
    y, expected = model(x), net(x)
    assert error(y, expected) < 1e-6
    y.square().sum().backward()
    expected.square().sum().backward()
    for (key, p), q in zip(net.named_parameters(), model.parameters(), strict=True):
        assert error(q.grad, p.grad) < 1e-5 or p.grad.norm() < 1e-5, key
    assert error(elastic.convert(net, x, divisor=4)(x), expected) < 1e-6


@pytest.mark.parametrize("name", NETS)
def test_every_width_is_the_extracted_network(name):
    net, x, groups = build(name)
    net, x = net.double(), x.double()
    model = elastic.convert(net, x, divisor=4)
    for width in (*WIDTHS, dict.fromkeys(groups - {"attention"}, 0.5)):
        plain = elastic.extract(model, width)
        model.zero_grad()
        with elastic.width(model, width):
            y = model(x)
            y.square().sum().backward()
        expected = plain(x)
        expected.square().sum().backward()
        assert error(y, expected) < 1e-12
        ours = dict(model.named_parameters())
        for key, p in plain.named_parameters():
            got = ours[key].grad.norm()
            assert abs(got - p.grad.norm()) <= 1e-10 * (1 + got), key


@pytest.mark.parametrize("name", NETS)
def test_cost_is_what_torch_counts(name):
    net, x, _ = build(name)
    model = elastic.convert(net, x, divisor=4)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not know it
    try:
        for width in WIDTHS:
            plain = elastic.extract(model, width)
            with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                plain(x)
            others = 2 * 7 * 7 * elastic.plan(model).units("", width)["a"] if name == "averaged" else 0  # written in it
            cost = elastic.cost(model, width)
            assert cost.params == sum(p.numel() for p in plain.parameters())
            assert 2 * (cost.macs + others) == counter.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_deployed_saved_and_in_eval_mode_without_gradients(name, tmp_path):
    """Where torch would take the inference path of its transformer layers."""
    net, x, _ = build(name)
    model = elastic.convert(net, x, divisor=4)
    elastic.save(model, tmp_path / "net.safetensors")
    again = elastic.load(tmp_path / "net.safetensors", NETS[name][0]().eval())
    pickled = pickle.loads(pickle.dumps(model))
    deployed = elastic.deploy(model)
    for width in WIDTHS:
        plain = elastic.extract(model, width)
        expected = plain(x)
        deployed.set_width(width)
        assert error(deployed(x), expected) < 2e-6
        assert torch.equal(pickle.loads(pickle.dumps(plain))(x), expected)
        with elastic.width(model, width), elastic.width(again, width), elastic.width(pickled, width):
            assert error(model(x), expected) < 2e-6
            assert torch.equal(again(x), model(x))
            assert torch.equal(pickled(x), model(x))
        uneven = [m for m in attentions(plain) if not m.embed_dim == m.out_proj.in_features == m.out_proj.out_features]
        assert all(type(m) is AnySizeMultiheadAttention for m in uneven)
        assert all(type(m) is nn.MultiheadAttention for m in attentions(plain) if m not in uneven)


def cut(net, made):
    """Load the first heads and features of ``net``, in its order, into a smaller network of the same class."""
    state = net.state_dict()
    for key, small in made.state_dict().items():
        t = state[key]
        if "in_proj" in key:
            t = t.view(3, t.shape[0] // 3, *t.shape[1:])[:, : small.shape[0] // 3]
            t = t[..., : small.shape[1]].flatten(0, 1) if small.dim() == 2 else t.flatten()
        state[key] = t[tuple(slice(0, n) for n in small.shape)]
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("name", ["vit", "post-norm", "pre-norm"])
@pytest.mark.parametrize(("width", "heads", "hidden"), [(0.75, 3, 36), (0.5, 2, 24), (0.25, 1, 12)])
def test_a_width_is_the_network_of_that_size_with_the_first_weights(name, width, heads, hidden):
    net, x, _ = build(name)
    size = {"d": 8 * heads, "h": heads, "m": hidden}
    options = {"vit": {}, "post-norm": {}, "pre-norm": {"norm_first": True}}[name]
    small = cut(net, type(net)(**size, **options)).eval()
    model = elastic.convert(net, x, divisor=4, sort=None)
    with elastic.width(model, width):
        y = model(x)
    assert error(y, small(x)) < 2e-6
    extracted = elastic.extract(model, width)
    assert getattr(extracted, "hidden_dim", 8 * heads) == 8 * heads
    type(net)(**size, **options).load_state_dict(extracted.state_dict(), strict=True)
    assert error(extracted(x), small(x)) < 1e-6
    y.square().sum().backward()
    small(x).square().sum().backward()
    for (key, p), q in zip(small.named_parameters(), model.parameters(), strict=True):
        assert abs(p.grad.norm() - q.grad.norm()) < 1e-4 * (1 + p.grad.norm()), key


def test_heads_and_features_are_sliced_apart():
    net, x, _ = build("self")
    model = elastic.convert(net, x, divisor=4, sort=None)
    plain = elastic.extract(model, {"attention": 0.5})
    assert type(plain.attention) is AnySizeMultiheadAttention
    assert plain.attention.num_heads == 2
    assert tuple(plain.attention.in_proj_weight.shape) == (3 * 16, D)
    made = AnySizeMultiheadAttention(D, 2, head_dim=8, batch_first=True)
    made.load_state_dict(plain.attention.state_dict(), strict=True)
    h = net.a(x)
    assert torch.equal(made(h, h, h)[0], plain.attention(h, h, h)[0])
    rows = torch.tensor([block * D + i for block in range(3) for i in range(16)])
    assert torch.equal(plain.attention.in_proj_weight, net.attention.in_proj_weight[rows])
    with pytest.raises(
        ValueError, match=r"SlimMultiheadAttention: expected a width of whole heads, a multiple of head_dim=8"
    ):
        model.attention.set_width(4)
    assert elastic.plan(model).groups["attention"].size == D
    assert elastic.plan(model).groups["attention"].units == H
    exported = torch.export.export(plain.eval(), (x,)).module()
    assert error(exported(x), plain(x)) < 1e-6


@pytest.mark.parametrize("sort", ["l1", "l2", "random", {"attention": [1, 2, 4, 3]}])
def test_whole_heads_are_sorted(sort):
    net, x, _ = build("self")
    model = elastic.convert(net, x, divisor=4, sort=sort)
    assert error(model(x), net(x)) < 1e-6
    heads = model.attention.in_proj_weight.view(3, H, D // H, D)
    sums, before = (t.abs().sum((0, 2, 3)) for t in (heads, net.attention.in_proj_weight.view(3, H, D // H, D)))
    assert error(sums.sort().values, before.sort().values) < 1e-6
    if isinstance(sort, dict):
        assert error(sums, before[[2, 3, 1, 0]]) < 1e-6


@torch.no_grad()
def test_torchs_inference_paths_with_padding():
    net, x, _ = build("post-norm")
    assert net.encoder.use_nested_tensor
    model = elastic.convert(net, x, divisor=4)
    assert error(model(x), net(x)) < 1e-6

    class Layer(nn.TransformerEncoderLayer):
        """A user's own, with torch's forward."""

    net = nn.Sequential(nn.Linear(5, D), Layer(D, H, 48, batch_first=True), nn.Linear(D, 3)).eval()
    model = elastic.convert(net, x, divisor=4)
    assert set(elastic.plan(model).groups) == {"0", "1.self_attn", "1.linear1"}
    for width in WIDTHS:
        plain = elastic.extract(model, width)
        assert type(plain[1]) is Layer
        with elastic.width(model, width):
            assert error(model(x), plain(x)) < 1e-6


def own_forward(net, x):
    h = net.a(x)
    return net.out(net.m(h + h @ net.attention.in_proj_weight[:D].t()) + net.attention(h, h, h)[0])


class Named(nn.MultiheadAttention):
    """A user's own, with torch's forward."""


@torch.no_grad()
def test_a_users_own_class_stays():
    net, x, _ = build("self")
    net.attention.__class__ = Named
    model = elastic.convert(net, x, divisor=4)
    for width in (0.5, {"attention": 0.5}):
        plain = elastic.extract(model, width)
        with elastic.width(model, width):
            assert error(model(x), plain(x)) < 1e-6
        for other in (model, plain):
            assert isinstance(other.attention, Named)
            assert torch.equal(pickle.loads(pickle.dumps(other))(x), other(x))
        assert (type(plain.attention) is Named) == (width == 0.5)


class Own(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        return super().forward(query, key, value, **kwargs)


def mlp():
    return nn.Sequential(nn.Linear(D, 24), nn.ReLU(), nn.Linear(24, D))


# What stays full, and why: network, dimensions that are left, layer, a word of the reason.
LEFT = {
    "weights read past it": (
        lambda: Net(
            own_forward, a=nn.Linear(5, D), m=mlp(), attention=nn.MultiheadAttention(D, H), out=nn.Linear(D, 3)
        ),
        {"m.0", "m.2"},
        "attention",
        "its weights are used outside of it",
    ),
    "a forward of its own": (
        lambda: Net(
            lambda net, x: net.out(net.m(net.attention(*3 * (net.a(x),))[0])),
            a=nn.Linear(5, D),
            m=mlp(),
            attention=Own(D, H),
            out=nn.Linear(D, 3),
        ),
        {"m.0", "m.2"},
        "attention",
        "Own has a forward of its own",
    ),
    "weights put out": (
        lambda: Net(
            lambda net, x: net.attention(*3 * (net.a(x),), average_attn_weights=False),
            a=nn.Linear(5, D),
            attention=nn.MultiheadAttention(D, H),
            out=nn.Linear(D, 3),
        ),
        {"a"},
        "attention",
        "its heads stay full",
    ),
    "one head": (
        lambda: one(attend, heads=1),
        {"a"},
        "attention",
        "its heads stay full: its channels cannot be taken",
    ),
}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_what_cannot_be_narrower_stays_and_says_why(name):
    make, groups, layer, reason = LEFT[name]
    net, x = perturbed(make, STEPS)
    model = elastic.convert(net, x, divisor=4)
    assert set(elastic.plan(model).groups) == groups
    assert reason in elastic.report(model).left_alone[layer]
    run = elastic.extract(model, 0.5)
    with elastic.width(model, 0.5):
        for ours, plain, full in zip(
            *(f(x) if isinstance(f(x), tuple) else (f(x),) for f in (model, run, net)), strict=True
        ):
            assert error(ours, plain) < 1e-6
            assert ours.shape == full.shape


def test_ignored_attention_stays():
    net, x, _ = build("vit")
    model = elastic.convert(net, x, divisor=4, ignore=["blocks.0.attention"])
    assert type(model.blocks[0].attention) is nn.MultiheadAttention
    assert isinstance(model.blocks[1].attention, SlimMultiheadAttention)
    assert elastic.report(model).left_alone["blocks.0.attention"] == "ignored, as asked"
    model = elastic.convert(net, x, divisor=4, ignore=["blocks.*.attention.out_proj"])
    assert "its out_proj is ignored" in elastic.report(model).left_alone["blocks.1.attention"]
    with elastic.width(model, 0.5):
        assert error(model(x), elastic.extract(model, 0.5)(x)) < 1e-6


@torch.no_grad()
def test_masks_for_all_heads_are_noted():
    net, x, _ = build("masks-of-heads")
    model = elastic.convert(net, x, divisor=4)
    assert elastic.report(model).notes == ["masks written for all heads are cut to those of the first heads: attention"]


@pytest.mark.parametrize("name", ["vit", "post-norm", "kdim-vdim"])
def test_a_training_step_sums_the_gradients_of_all_widths(name):
    net, x, _ = build(name)
    model = elastic.convert(net, x, widths=[0.25, 0.5, 1.0], divisor=4)
    target = torch.randn_like(net(x))
    for width in (1.0, 0.5, 0.25):
        with elastic.width(model, width):
            nn.functional.mse_loss(model(x), target).backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    train.sandwich_step(model, (x, target), nn.functional.mse_loss, None, rule="all", distill=None)
    for key, p in model.named_parameters():
        assert error(p.grad, expected[key]) < 1e-5 or p.grad.norm() < 1e-5, key


def test_depth_search_and_calibration():
    torch.manual_seed(0)
    net = ViT(blocks=3).eval()
    net.patches = nn.Sequential(nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), net.patches.__class__(24, D, 4, 4))
    x = torch.randn(2, 3, 16, 16)
    model = elastic.convert(net, x, widths=[0.25, 0.5, 1.0], divisor=4, depth=True)
    assert elastic.plan(model).stages["blocks"].blocks == ("blocks.0", "blocks.1", "blocks.2")
    elastic.calibrate(model, [torch.randn(4, 3, 16, 16)])
    with torch.no_grad():
        for width, depth in ((1.0, 1 / 3), (0.5, 2 / 3), (0.25, 1.0)):
            plain = elastic.extract(model, width, depth).eval()
            assert all(isinstance(block, ViTBlock) for block in plain.blocks)
            with elastic.width(model, width, depth):
                assert error(model.eval()(x), plain(x)) < 2e-6
            assert elastic.cost(model, width, depth).params == sum(p.numel() for p in plain.parameters())
    best = elastic.search(
        model, lambda m: float(elastic.plan(m).current), max_params=12000, widths=[0.25, 0.5, 1.0]
    ).best
    assert best.width == 0.5


@pytest.mark.parametrize("name", ["vit", "transformer"])
def test_few_graphs_for_many_widths(name):
    net, x, _ = build(name)
    model = elastic.convert(net, x, divisor=4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = elastic.compile(model, backend=counter, fullgraph=True)
    for width in (1.0, 0.5, 0.75, 0.25, 0.4):
        elastic.set_width(model, width)
        assert error(compiled(x), model(x)) < 1e-6
    assert counter.frame_count <= 3
