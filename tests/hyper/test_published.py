"""Checkpoints laid out as the published code saves them give the weights that its formulas give."""

import math

import pytest
import torch
import torch.nn.functional as F

from slimkernels import elastic, hyper
from slimkernels.models import CifarResNet

HIDDEN, LAYERS, BANDS, NORM = 12, 4, 3, 64.0
NAMES = ["layer3.2.conv1.weight", "layer3.2.conv1.bias", "layer3.2.conv2.weight", "layer3.2.conv2.bias"]


def target():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    return elastic.convert(hyper.fold_batch_norm(CifarResNet(20, (8, 8, 12)).eval(), x), x, divisor=1, sort=None)


def network(prefix, outputs):
    torch.manual_seed(len(prefix) + outputs)
    shapes = {"initial_layer.weight": (HIDDEN, 6 + 12 * BANDS), "initial_layer.bias": (HIDDEN,)}
    for k in range(LAYERS - 1):
        shapes |= {f"residual_blocks.{k}.weight": (HIDDEN, HIDDEN), f"residual_blocks.{k}.bias": (HIDDEN,)}
        shapes |= {f"scalars.{k}": ()}
    shapes |= {"output_layer.weight": (outputs, HIDDEN), "output_layer.bias": (outputs,)}
    return {
        f"model.{prefix}.{key}": torch.randn(shape) / (shape[-1] ** 0.5 if shape else 3)
        for key, shape in shapes.items()
    }


def numbered(outputs=9, count=4):
    return {key: w for i in range(count) for key, w in network(str(i), outputs).items()}


def named():
    """The second seed of the method: a network by its tensor's name, and one output for a bias."""
    return {
        key: w
        for name in reversed(NAMES)
        for key, w in network(name.replace(".", "_"), 9 if name.endswith("weight") else 1).items()
    }


def published(state, prefix, i, shape, compat):
    """One tensor as the published code makes it, coordinate by coordinate."""
    w = torch.empty(shape)
    c_out, c_in = (*shape, 1)[:2]
    act = F.elu if compat == "htty" else F.relu
    for a in range(c_out):
        for b in range(c_in):
            v = torch.tensor([i, a, b, 4, c_out, c_in], dtype=torch.float64) / NORM
            v[:3] = v[:3] / v[3:]
            e = [v]
            for f in range(BANDS):
                waves = [(2**f * math.pi * v).sin(), (2**f * math.pi * v).cos()]
                e.append(torch.cat(waves) if compat == "htty" else torch.stack(waves, 1).flatten())
            p = {
                k.removeprefix(f"model.{prefix}."): t.double()
                for k, t in state.items()
                if k.startswith(f"model.{prefix}.")
            }
            h = act(p["initial_layer.weight"] @ torch.cat(e) + p["initial_layer.bias"])
            for k in range(LAYERS - 1):
                z = p[f"residual_blocks.{k}.weight"] @ h + p[f"residual_blocks.{k}.bias"]
                h = p[f"scalars.{k}"] * act(z) + h
            y = (p["output_layer.weight"] @ h + p["output_layer.bias"]) / c_in
            if len(shape) == 4:
                start = len(y) // 2 - 9 // 2 if len(y) > 9 else 0
                w[a, b] = y[start : start + 9].view(3, 3)
            else:
                w[a] = y[0]
    return w


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize(("compat", "outputs"), [("neumeta", 9), ("neumeta", 25), ("neumeta", 12), ("htty", None)])
def test_published_checkpoint_gives_the_published_weights(compat, outputs, width):
    state = named() if outputs is None else numbered(outputs)
    gen = hyper.load_published(state, target(), "layer3.2", norm=NORM, compat=compat).eval()
    weights = gen(width)
    assert list(weights) == NAMES
    for i, (name, w) in enumerate(weights.items()):
        prefix = str(i) if outputs else name.replace(".", "_")
        want = published(state, prefix, i, tuple(w.shape), compat)
        torch.testing.assert_close(w, want, rtol=1e-4, atol=1e-5)


def test_published_checkpoint_as_saved():
    """Inside the saved file, with a moving average, from several processes; blocks; and back from a state dict."""
    state, average = numbered(), numbered(25)
    average = {key: 0.5 * w if "output" not in key else 0.5 * state[key] for key, w in average.items()}
    file = {"epoch": 3, "model_state_dict": {f"module.{k}": w for k, w in state.items()}, "best_acc": 0.9}
    plain = hyper.load_published(state, target(), "layer3.2", norm=NORM).eval()
    inside = hyper.load_published(
        file, target(), "layer3.2", norm=NORM, blocks=["layer3.2.conv1", "layer3.2.conv2"]
    ).eval()
    file = {"state_dict": state, "ema_shadow": average}
    averaged = hyper.load_published(file, target(), "layer3.2", norm=NORM).eval()
    current = hyper.load_published(file, target(), "layer3.2", norm=NORM, ema=False).eval()
    want = hyper.load_published(average, target(), "layer3.2", norm=NORM).eval()
    for name, w in plain(0.5).items():
        assert torch.equal(inside(0.5)[name], w)
        assert torch.equal(current(0.5)[name], w)
        assert torch.equal(averaged(0.5)[name], want(0.5)[name])
        assert not torch.allclose(averaged(0.5)[name], w)
    other = hyper.load_published(average, target(), "layer3.2", norm=NORM).eval()
    other.load_state_dict(plain.state_dict())
    assert all(torch.equal(w, plain(0.7)[name]) for name, w in other(0.7).items())
    for options, text in (
        ({"norm": 32.0}, "with norm 32.0, got 64.0"),
        ({"compat": "htty"}, "with compat htty, got neumeta"),
    ):
        with pytest.raises(ValueError, match=text):
            hyper.load_published(state, target(), "layer3.2", **{"norm": NORM, **options}).load_state_dict(
                plain.state_dict()
            )


def test_published_names_and_noise():
    renamed = {key.replace("layer3_2", "stage_last"): w for key, w in named().items()}
    names = {name: name.replace("layer3.2", "stage.last") for name in NAMES}
    gen = hyper.load_published(renamed, target(), "layer3.2", norm=NORM, compat="htty", names=names).eval()
    want = hyper.load_published(named(), target(), "layer3.2", norm=NORM, compat="htty", noise="axis").eval()
    name = NAMES[0]
    assert torch.equal(gen(0.5)[name], want(0.5)[name])
    assert not torch.equal(gen(0.5, seed=1)[name], want(0.5, seed=1)[name])
    gen.train()
    sum(w.square().sum() for w in gen(0.5).values()).backward()
    assert all(p.grad is not None for p in gen.networks.parameters())


def without(key):
    state = numbered()
    del state[key]
    return state


@pytest.mark.parametrize(
    ("state", "options", "text"),
    [
        ({"fc.weight": torch.ones(1)}, {}, r"expected keys model.<network>.initial_layer.weight, .* got 'fc.weight'"),
        ({"model.0.bns.0.weight": torch.ones(1)}, {}, r"expected keys .* got 'model.0.bns.0.weight'"),
        ({}, {}, "expected a checkpoint with at least one network, got none"),
        (without("model.1.output_layer.bias"), {}, "expected a key 'model.1.output_layer.bias', got none"),
        (without("model.2.residual_blocks.0.weight"), {}, "expected a key 'model.2.residual_blocks.0.weight', got none"),
        (without("model.3.scalars.2"), {}, "expected a key 'model.3.scalars.2', got none"),
        ({**numbered(), "model.0.scalars.3": torch.tensor(1.0)}, {}, r"'0' with 3 residual layers, got also"),
        ({**numbered(), "model.0.scalars.0": torch.ones(1)}, {}, r"'model.0.scalars.0' of shape \(\), got \(1,\)"),
        ({**numbered(), "model.0.initial_layer.weight": torch.ones(12, 40)}, {}, r"\(hidden, 6 \+ 12 \* bands\), got \(12, 40\)"),
        ({**numbered(), "model.0.output_layer.weight": torch.ones(9, 4)}, {}, r"12 inputs, got 3 and \(9, 4\)"),
        ({**numbered(), "model.0.initial_layer.weight": torch.ones(12, 30)}, {}, r"got \(12, 30, 4\) for '0'"),
        (numbered(count=3), {}, "expected 4 networks, one for each generated tensor, got 3"),
        (numbered(4), {}, "at least 9 outputs, and no tile, for 'layer3.2.conv1.weight', got 4"),
        (named(), {"names": {NAMES[0]: "x"}}, "expected a network 'x' for 'layer3.2.conv1.weight'"),
        (numbered(), {"compat": "nm"}, "expected compat to be one of neumeta, htty, got 'nm'"),
        (numbered(), {"norm": 0.0}, "expected norm to be positive or None, got 0.0"),
        (numbered(), {"tensors": "layer9"}, "expected names or globs"),
    ],
)  # fmt: skip
def test_published_errors(state, options, text):
    with pytest.raises(ValueError, match=text):
        hyper.load_published(state, target(), **{"tensors": "layer3.2", "norm": NORM, **options})


def test_published_layouts_that_do_not_fit():
    x = torch.randn(1, 4, 6, 6)
    net = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(4, 6, 2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 49, 5),
        torch.nn.Linear(5, 3),
    )
    model = elastic.convert(net, x, divisor=1, sort=None)
    state = {"model.0." + key.removeprefix("model.0."): w for key, w in network("0", 64).items()}
    for name, text in (
        ("0.weight", "transposed convolutions, got '0.weight'"),
        ("3.weight", "after a flatten, got '3.weight'"),
    ):
        with pytest.raises(ValueError, match=text):
            hyper.load_published(state, model, name, norm=NORM)
    with pytest.raises(TypeError, match="expected checkpoint to be a mapping, got list"):
        hyper.load_published([], model, norm=NORM)
    matrix = hyper.load_published(state, model, "4.weight", norm=NORM).eval()(1.0)["4.weight"]
    assert matrix.shape == (3, 5)
