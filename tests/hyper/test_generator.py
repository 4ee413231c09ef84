"""The generator: what it makes is what its coordinate networks say, at every width, for every kind of layer."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from slimkernels import elastic, hyper
from slimkernels.models import CifarResNet, DigitCNN
from slimkernels.reference.inr_weights import axis_columns
from tests.elastic import nets

WIDTHS = (1.0, 0.7, 0.53, 0.25)
NETS = ["resnet20", "mobilenet_v2", "vgg11", "densenet", "shufflenet_v2", "unet"]


def digits(**options):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 28, 28)
    return elastic.convert(DigitCNN((8, 12, 16), 24).eval(), x, divisor=1, **options), x


def generator(model, **options):
    torch.manual_seed(1)
    return hyper.WeightGenerator(model, **{"hidden": 16, "layers": 3, "bands": 3, **options}).eval()


@torch.no_grad()
def disturb(gen):
    """Networks whose output is not zero."""
    for p in gen.networks.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return gen


@pytest.mark.parametrize("name", [*NETS, "convnext"])
def test_residual_generator_starts_as_the_sliced_network(name):
    net, x = nets.build(name)
    model = elastic.convert(net, x, divisor=1, norm="shared")
    gen = generator(model)
    with torch.no_grad():
        for width in (1.0, 0.53):
            with elastic.width(model, width):
                expected = model(x)
            torch.testing.assert_close(gen.call(x, width), expected, rtol=1e-4, atol=1e-5)
            sliced = dict(elastic.extract(model, width).named_parameters())
            assert all(torch.equal(w, sliced[key]) for key, w in gen(width).items())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("base", ["residual", None])
def test_functional_call_and_materialize_agree(name, base):
    net, x = nets.build(name)
    model = elastic.convert(net, x, divisor=1, norm="shared")
    gen = disturb(generator(model, base=base, skip=0.1))
    with torch.no_grad():
        plain, weights = gen.materialize(0.53), gen(0.53)
        named = dict(plain.named_parameters())
        assert all(torch.equal(named[key], w) for key, w in weights.items())
        assert not any(type(m).__module__.startswith("slimkernels.nn") for m in plain.modules())
        expected = plain(x)
        bound = 1e-4 * expected.abs().max().item()
        skeleton = elastic.extract(model, 0.53)
        torch.testing.assert_close(functional_call(skeleton, weights, (x,)), expected, rtol=1e-4, atol=bound)
        torch.testing.assert_close(gen.call(x, 0.53, weights), expected, rtol=1e-4, atol=bound)
        with elastic.width(model, 0.53):
            assert not torch.allclose(model(x), expected)


def test_elastic_target_takes_the_weights_directly():
    model, x = digits()
    gen = disturb(generator(model))
    for width in WIDTHS:
        with elastic.width(model, width), torch.no_grad():
            output = functional_call(model, gen(width), (x,))
        torch.testing.assert_close(output, gen.materialize(width)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compat", ["neumeta", "htty"])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_weights_follow_the_formula(positions, compat):
    """Slice + scale * network(encoding) / inputs, spelled out for one tensor."""
    model, _ = digits()
    options = {"bands": 2, "size_bands": None, "positions": positions, "compat": compat}
    gen = disturb(generator(model, tensors="conv_layers.3.weight", **options))
    n = gen.networks[0]
    got = gen(0.5)["conv_layers.3.weight"]
    c_out, c_in = got.shape[:2]
    norm = 12.0
    outputs, inputs = (c_out, c_in) if positions == "relative" else gen.targets[0].shape[:2]
    a, b = torch.meshgrid(torch.arange(c_out) / outputs, torch.arange(c_in) / inputs, indexing="ij")
    like = torch.ones_like(a)
    v = torch.stack([0 * like, a, b, like / norm, like * c_out / norm, like * c_in / norm], -1)
    e = [v]
    for f in range(2):
        angle = 2**f * torch.pi * v
        e.append(torch.stack([angle.sin(), angle.cos()], -1 if compat == "neumeta" else -2).flatten(-2))
    h = torch.relu(torch.cat(e, -1) @ n.w_in[0].T + n.b_in[0])
    for k in range(n.skip.shape[1]):
        h = h + n.skip[0, k] * torch.relu(h @ n.w_hidden[0, k].T + n.b_hidden[0, k])
    w = (h @ n.w_out[0].T + n.b_out[0]) / c_in
    base = dict(gen.target.named_parameters())["conv_layers.3.weight"][:c_out, :c_in]
    torch.testing.assert_close(got, base + n.scale[0] * w.unflatten(-1, (3, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg11", "densenet", "unet"])  # flattened channels, concatenated ones, transposed
def test_absolute_positions_keep_a_channel_in_its_place(name):
    """Where the active sizes say nothing, a narrower tensor has the wider one's values at its channels."""
    net, x = nets.build(name)
    gen = disturb(generator(elastic.convert(net, x, divisor=1, norm="shared"), base=None, positions="absolute"))
    n = gen.networks[0]
    with torch.no_grad():
        before = gen(0.53)
        for axis in (4, 5):
            n.w_in[..., axis_columns(axis, 3, "neumeta")] = 0
        full, narrow = gen(1.0), gen(0.53)
        units = elastic.plan(gen.target).units("test", 0.53)
    for target in gen.targets:
        inputs = target.whole()[1] / target.active(units)[1]
        wide = target.taken(full[target.name], units) * inputs
        torch.testing.assert_close(narrow[target.name], wide, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(before[key], narrow[key], rtol=1e-2) for key in narrow)


@pytest.mark.parametrize("noise", ["axis", "element"])
def test_mean_over_samples_is_the_mean_of_calls(noise):
    model, _ = digits()
    gen = disturb(generator(model, noise=noise))
    mean = gen(0.7, 4, seed=5)
    calls = [gen(0.7, seed=5, first_sample=k) for k in range(4)]
    for key, w in mean.items():
        torch.testing.assert_close(w, torch.stack([c[key] for c in calls]).mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.equal(calls[0]["fc_layers.0.weight"], calls[1]["fc_layers.0.weight"])
    again = gen(0.7, 4, seed=5)
    assert all(torch.equal(mean[key], again[key]) for key in mean)


def test_noise_only_in_training_and_averaging():
    model, _ = digits()
    gen = disturb(generator(model))
    key = "conv_layers.3.weight"
    assert torch.equal(gen(0.7)[key], gen(0.7)[key])
    assert torch.equal(gen.materialize(0.7, 3).conv_layers[3].weight, gen(0.7, 3)[key])
    gen.train()
    assert not torch.equal(gen(0.7)[key], gen(0.7)[key])
    torch.manual_seed(3)
    first = gen(0.7)[key]
    torch.manual_seed(3)
    assert torch.equal(first, gen(0.7)[key])
    assert torch.equal(gen.materialize(0.7).conv_layers[3].weight, gen.eval()(0.7)[key])


def test_gradients_reach_networks_and_extras_only():
    model, x = digits()
    gen = generator(model, tensors="conv_layers").train()
    gen.train_extras("fc_layers.2.bias")
    gen.call(x, 0.53).square().sum().backward()
    with_gradient = {name for name, p in gen.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient == {"networks.0.w_out", "networks.0.b_out", "target.fc_layers.2.bias"}
    assert {id(p) for p in gen.trained_parameters()} == {id(p) for p in gen.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_one_tensor_of_a_layer_is_generated_beside_the_targets_other(kind):
    model, x = digits()
    gen = disturb(generator(model, tensors=f"*.{kind}"))
    for w in WIDTHS:
        torch.testing.assert_close(gen.call(x, w), gen.materialize(w)(x))


def test_a_trained_base_gets_the_gradient_of_its_leading_slice():
    model, x = digits()
    gen = disturb(generator(model, tensors="conv_layers.*.weight")).train()
    base = gen.train_base()
    assert [id(p) for p in base] == [id(p) for p in gen.originals().values()]
    weights = gen(0.5)
    name, w = next(iter(weights.items()))
    w.sum().backward()
    gradient = gen.originals()[name].grad
    expected = torch.zeros_like(gradient)
    expected[tuple(slice(n) for n in w.shape)] = 1
    assert torch.equal(gradient, expected)
    assert {id(p) for p in gen.trained_parameters()} == {id(p) for p in gen.parameters() if p.requires_grad}
    with torch.no_grad():
        base[0].mul_(2)
    fresh = generator(model, tensors="conv_layers.*.weight")
    fresh.train_base()
    fresh.load_state_dict(copy.deepcopy(gen.state_dict()))  # though its weights are no longer the pre-trained ones
    assert torch.equal(fresh.call(x, 0.5), gen.eval().call(x, 0.5))
    with pytest.raises(ValueError, match="expected base='residual' to train the base of, got base=None"):
        generator(model, base=None).train_base()


def test_the_model_given_stays_as_it_is():
    model, x = digits()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gen = disturb(generator(model))
    gen.call(x, 0.25)
    gen.materialize(0.25)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_write_into_slimmable_storage():
    model, x = digits()
    gen = disturb(generator(model))
    storage = [p.data_ptr() for p in model.parameters()]
    gen.write_into(model)
    assert [p.data_ptr() for p in model.parameters()] == storage
    torch.testing.assert_close(model(x), gen.materialize(1.0)(x), rtol=1e-4, atol=1e-4)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(w, parameters[key]) for key, w in gen(1.0).items())
    with elastic.width(model, 0.5):
        assert model(x).isfinite().all()


def test_a_linear_after_a_flatten_is_made_of_kernels():
    model, _ = digits()
    gen = generator(model, tensors=["fc_layers.0.weight", "fc_layers.2.weight"])
    first, last = gen.targets
    assert (first.per_unit, first.kernel) == (9, (9,))
    assert (last.per_unit, last.kernel) == (1, ())
    assert gen(0.5)["fc_layers.0.weight"].shape == (12, 72)


def test_tiles_and_shared_network():
    model, _ = digits()
    gen = disturb(generator(model, mlp="shared", tile={"fc_layers.0.weight": (5, 3)}))
    assert gen.networks[0].w_in.shape[0] == 1
    assert gen.networks[0].w_out.shape[1] == 5 * 3 * 9
    plain = elastic.extract(model, 0.53)
    assert {key: w.shape for key, w in gen(0.53).items()} == {key: p.shape for key, p in plain.named_parameters()}
    assert generator(model, tile=(2, 2)).targets[-2].tile == (2, 2)


def test_without_base_weights_start_as_large_as_the_targets():
    model, _ = digits()
    gen = generator(model, base=None)
    originals = gen.originals()
    for key, w in gen(1.0).items():
        share = 0.05 if w.dim() == 1 else 1.0
        wanted = share * originals[key].square().mean().sqrt()
        torch.testing.assert_close(w.square().mean().sqrt(), wanted, rtol=1e-3, atol=0)
        assert w.mean().abs() < 1e-3 * w.norm()


def test_match_outputs_keeps_signals_alive():
    model, _ = digits()
    x = torch.randn(16, 1, 28, 28)
    gen = generator(model, base=None)

    def variations(net):
        found = []
        hooks = [
            m.register_forward_hook(lambda _m, _i, y: found.append(y.std(0).mean()))
            for m in net.modules()
            if hasattr(m, "weight")
        ]
        with torch.no_grad():
            net(x)
        for hook in hooks:
            hook.remove()
        return torch.stack(found)

    wanted = variations(model)
    factors = hyper.match_outputs(gen, x)
    assert list(factors) == ["conv_layers.0", "conv_layers.3", "conv_layers.6", "fc_layers.0", "fc_layers.2"]
    torch.testing.assert_close(variations(gen.materialize()), wanted, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="match_outputs: expected a generator without base, got base='residual'"):
        hyper.match_outputs(generator(model), x)


def test_plain_target_is_converted():
    net = DigitCNN((8, 12, 16), 24)
    x = torch.randn(2, 1, 28, 28)
    gen = hyper.WeightGenerator(net, example_inputs=x, convert={"sort": None, "divisor": 4}, hidden=8, layers=2).eval()
    torch.testing.assert_close(gen.call(x), net(x), rtol=1e-4, atol=1e-5)


def test_init_from_copies_the_networks_of_a_block():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    model = elastic.convert(hyper.fold_batch_norm(CifarResNet(20, (8, 8, 12)).eval(), x), x, divisor=2)
    gen = disturb(generator(model, tensors=["layer3.1", "layer3.2"], blocks=["layer3.1", "layer3.2"]))
    copied = gen.init_from("layer3.1", "layer3.2")
    assert copied == [f"layer3.2.conv{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert torch.equal(gen.networks[0].w_hidden, gen.networks[1].w_hidden)
    other = generator(model, tensors="layer3.0", hidden=8)
    with pytest.raises(ValueError, match="init_from: expected networks of one size"):
        gen.init_from("layer3.0", "layer3.1", other)
    with pytest.raises(ValueError, match="init_from: expected tensors of the same names"):
        gen.init_from("conv1", "layer3.1")


def test_parameters_that_are_not_trained_have_to_be_named_in_full():
    model = elastic.convert(CifarResNet(20, (8, 8, 12)).eval(), torch.randn(1, 3, 8, 8), divisor=2, norm="shared")
    assert "layer3.0.shortcut.weight" not in generator(model)(1.0)
    assert "layer3.0.shortcut.weight" in generator(model, tensors="layer3.0.shortcut.weight")(1.0)


def test_state_round_trip_and_another_target():
    model, x = digits()
    gen = disturb(generator(model))
    fresh = generator(model)
    fresh.load_state_dict(copy.deepcopy(gen.state_dict()))
    assert torch.equal(fresh.call(x, 0.5), gen.call(x, 0.5))
    other = generator(elastic.convert(DigitCNN((8, 12, 20), 24), x, divisor=1))
    weights = generator(elastic.convert(DigitCNN((8, 12, 16), 24), x, divisor=1))
    kept = copy.deepcopy(weights.target.state_dict())
    with pytest.raises(
        ValueError, match=r"the same pre-trained weights, .* got other weights in 'conv_layers.0.weight'"
    ):
        weights.load_state_dict(gen.state_dict())
    assert all(torch.equal(kept[k], v) for k, v in weights.target.state_dict().items() if isinstance(v, torch.Tensor))
    with pytest.raises(ValueError, match="the state is of another target: expected tensors"):
        other.load_state_dict(gen.state_dict())
    with pytest.raises(ValueError, match="expected a state with positions relative, got absolute"):
        generator(model, positions="relative").load_state_dict(gen.state_dict())
    with pytest.raises(ValueError, match="expected a state with base"):
        generator(model, base=None).load_state_dict(gen.state_dict())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tensors": "head.*"}, "expected names or globs of the target's tensors, got 'head"),
        ({"base": "sum"}, "expected base to be one of 'residual', None, got 'sum'"),
        ({"mlp": "one"}, "expected mlp to be one of"),
        ({"noise": "white"}, "expected noise to be one of"),
        ({"hidden": 0}, "expected hidden to be an integer of at least 1, got 0"),
        ({"layers": 1}, "expected layers to be an integer of at least 2, got 1"),
        ({"positions": "polar"}, "expected positions to be one of None, 'relative', 'absolute', got 'polar'"),
        ({"positions": "absolute", "mlp": "shared"}, "expected absolute positions with mlp='per_tensor' only"),
        ({"bands": 0}, "expected bands to be a positive integer or 'auto', got 0"),
        ({"tile": (0, 1)}, "expected a tile to be a pair of positive integers"),
        ({"blocks": ["fc_layers"]}, "expected every generated tensor in a block, got 'conv_layers.0.weight'"),
        ({"blocks": ["nothing"]}, "expected blocks that hold generated tensors, got 'nothing'"),
        ({"blocks": ["fc_layers", "fc_layers.0"]}, "expected blocks apart, got 'fc_layers.0.weight'"),
        ({"example_inputs": 1}, "expected no example_inputs"),
    ],
)
def test_errors(options, text):
    model, _ = digits()
    with pytest.raises(ValueError, match=text):
        generator(model, **options)


def test_errors_of_target_width_and_names():
    model, _ = digits(widths=(0.25, 1.0))
    gen = generator(model)
    with pytest.raises(ValueError, match=r"WeightGenerator: expected width between 0\.25 and 1, got 0\.1"):
        gen(0.1)
    with pytest.raises(ValueError, match=r"expected width between 0\.25 and 1"):
        gen.materialize(0.1)
    with pytest.raises(ValueError, match="expected names or globs of tensors that are not generated, got 'x'"):
        gen.train_extras("x")
    with pytest.raises(ValueError, match=r"expected an elastic target .* got neither"):
        hyper.WeightGenerator(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"expected target to be an nn\.Module, got int"):
        hyper.WeightGenerator(3)
    other = elastic.convert(DigitCNN((8, 12, 20), 24), torch.randn(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"write_into: expected a model with a tensor .* got \(20, 12, 3, 3\)"):
        gen.write_into(other)
    norms = elastic.convert(CifarResNet(20, (8, 8, 12)).eval(), torch.randn(1, 3, 8, 8), norm="shared")
    with pytest.raises(ValueError, match="batch norms can be folded first"):
        generator(norms, tensors="bn1.weight")
