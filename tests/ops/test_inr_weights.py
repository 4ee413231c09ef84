import pytest
import torch

from benchmarks.published_inr import coordinates, encode, evaluate, generate
from slimkernels.ops import InrParameters, InrTensor, inr_weights
from slimkernels.reference import inr_weights as reference
from tests.helpers import DEVICE, DTYPES, check_as_good_as_pytorch, check_gradients, check_graphs, dtype_id, error

NORM = 128.0


def networks(count=1, hidden=16, depth=2, bands=4, outputs=9, dtype=torch.float32):
    """Random networks whose activations neither vanish nor explode."""
    inputs = 6 + 12 * bands
    return InrParameters(
        torch.randn(count, hidden, inputs, dtype=dtype) / inputs**0.5,
        torch.randn(count, hidden, dtype=dtype) * 0.1,
        torch.randn(count, depth, hidden, hidden, dtype=dtype) * (2 / hidden) ** 0.5,
        torch.randn(count, depth, hidden, dtype=dtype) * 0.1,
        torch.full((count, depth), 0.3, dtype=dtype) + torch.randn(count, depth, dtype=dtype) * 0.05,
        torch.randn(count, outputs, hidden, dtype=dtype) / hidden**0.5,
        torch.randn(count, outputs, dtype=dtype) * 0.1,
    )


def target(layers=4):
    """A small target with every layout, a tiled linear layer and a bias; base, scale and full sizes to go with it."""
    tensors = [
        InrTensor(0, layers, (3, 3), 0),
        InrTensor(1, layers, (1, 3), 1, "iohw", positions=(9, 7)),
        InrTensor(2, layers, (2, 2), 1, "channels_last"),
        InrTensor(3, layers, (), 2, tile=(2, 3)),
        InrTensor(3, layers, (), 0, "bias"),
    ]
    active = [(7, 5), (6, 3), (5, 9), (9, 10), (11, 1)]
    base = [torch.randn(tensor.shape(o + 3, i + (i > 1) * 2)) for tensor, (o, i) in zip(tensors, active, strict=True)]
    base[2] = base[2].contiguous(memory_format=torch.channels_last)
    return tensors, active, base, torch.randn(len(tensors))


def op(*args, **kwargs):
    return inr_weights(args[:7], *args[7:9], base=list(args[9:-1]) or None, scale=args[-1], **kwargs)


def oracle(*args, save="auto", **kwargs):
    return generate(args[:7], *args[7:9], base=list(args[9:-1]) or None, scale=args[-1], **kwargs)


def sample(parameters, with_base=True, with_scale=True):
    tensors, active, base, scale = target()
    return (*parameters, tensors, active, *(base if with_base else []), scale if with_scale else None)


@pytest.mark.parametrize("save", ["full", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("hidden", [16, 33, 64])
def test_inr_weights_as_good_as_pytorch(hidden, dtype, save):
    args = sample(networks(3, hidden))
    check_as_good_as_pytorch(op, oracle, args, {"norm": NORM, "save": save}, dtype)


@pytest.mark.parametrize("width", [17, 33, 47])
def test_inr_weights_odd_widths(width):
    tensors = [InrTensor(0, 4, (3, 3)), InrTensor(1, 4, (3, 3), 1), InrTensor(2, 4, (), 2, "bias")]
    active = [(width, width - 1), (64, width), (width, 1)]
    args = (*networks(3, 32, bands=8), tensors, active, None)
    check_as_good_as_pytorch(op, oracle, args, {"norm": NORM}, torch.float32)


def placed(full=(65, 48)):
    """Tensors whose channels stay where they are at the full width."""
    return [
        InrTensor(0, 4, (3, 3), 0, positions=full),
        InrTensor(1, 4, (1, 3), 1, "iohw", positions=full),
        InrTensor(2, 4, (2, 2), 1, "channels_last", positions=full),
        InrTensor(3, 4, (), 2, tile=(2, 3), positions=full),
        InrTensor(3, 4, (), 0, "bias", positions=(full[0], 1)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("save", ["full", "recompute"])
@pytest.mark.parametrize("width", [17, 33, 47])
def test_inr_weights_positions_of_the_full_width(width, save, dtype):
    active = [(width, width - 2), (width + 1, 9), (5, width), (width, 10), (width, 1)]
    base = [torch.randn(t.shape(o + 3, i + (i > 1) * 2)) for t, (o, i) in zip(placed(), active, strict=True)]
    args = (*networks(3, 33, bands=6), placed(), active, *base, torch.randn(5))
    check_as_good_as_pytorch(op, oracle, args, {"norm": NORM, "save": save}, dtype)


@pytest.mark.parametrize("noise", ["none", "axis"])
def test_inr_weights_positions_give_a_slice_of_the_full_width(noise):
    """But for the coordinates of the sizes, which the networks here ignore, and the active inputs that divide."""
    p = networks(3, 32, bands=6)
    for axis in (4, 5):
        p.w_in[..., reference.axis_columns(axis, 6, "neumeta")] = 0
    options = {"norm": NORM, "noise": noise, "seed": 3, "samples": 2}
    full = inr_weights(p, placed(), [(65, 48)] * 4 + [(65, 1)], **options)
    active = [(17, 33), (33, 47), (47, 17), (31, 13), (7, 1)]
    for t, (o, i), w, wide in zip(placed(), active, inr_weights(p, placed(), active, **options), full, strict=True):
        cut = wide[:i, :o] if t.layout == "iohw" else wide[:o] if t.layout == "bias" else wide[:o, :i]
        inputs = 1 if t.layout == "bias" else 48
        assert error(w * i / inputs, cut) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("activation", ["relu", "elu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("save", ["full", "recompute"])
def test_inr_weights_activations(activation, save, dtype):
    args = sample(networks(3, 24))
    check_as_good_as_pytorch(op, oracle, args, {"norm": NORM, "activation": activation, "save": save}, dtype)


@pytest.mark.parametrize("depth", [1, 7])
def test_inr_weights_depths(depth):
    check_as_good_as_pytorch(op, oracle, sample(networks(3, 20, depth), False, False), {"norm": NORM}, torch.float32)


def test_inr_weights_without_hidden_layers():
    args = sample(networks(3, 20, depth=0), False, False)
    for actual, want in zip(op(*args, norm=NORM), oracle(*args, norm=NORM), strict=True):
        assert error(actual, want) < 1e-6


def test_inr_weights_several_widths_in_one_call_equal_one_call_a_width():
    tensors, active, base, scale = target()
    narrow = [(o - 2, i if t.layout == "bias" else i - 1) for t, (o, i) in zip(tensors, active, strict=True)]
    options = {"norm": NORM, "base": base, "scale": scale, "noise": "axis", "seed": 5}
    p = networks(3)
    together = inr_weights(p, tensors, active + narrow, **options)
    apart = inr_weights(p, tensors, active, **options) + inr_weights(p, tensors, narrow, **options)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


def test_inr_weights_first_layer_is_a_sum_of_axis_terms():
    p = networks(1, 32, bands=16)
    tensor = InrTensor(2, 5, (3, 3))
    job = reference.jobs([13, 11], tensor.packed())[0]
    layer = reference._FirstLayer(
        job, 0, 0, 13, p.w_in[0], p.b_in[0], reference._Noise("none", 0, 0.5), "neumeta", NORM
    )
    published = encode(coordinates(tensor, 13, 11, NORM, torch.float32), 16, "neumeta") @ p.w_in[0].t() + p.b_in[0]
    assert error(layer.forward(), published) < 1e-6


def test_inr_weights_htty_order_and_default_activation():
    args = sample(networks(3), False, False)
    expected = oracle(*args, norm=NORM, activation="elu", compat="htty")
    for actual, want in zip(op(*args, norm=NORM, compat="htty"), expected, strict=True):
        assert error(actual, want) < 1e-6


@pytest.mark.parametrize("noise", ["axis", "element"])
@pytest.mark.parametrize("compat", ["neumeta", "htty"])
def test_inr_weights_noise_moves_the_coordinates(noise, compat):
    """Against the published layers evaluated at coordinates shifted by the documented offsets."""
    p = networks(2, bands=3)
    tensors, active, seed, limit = [InrTensor(1, 3, (3, 3)), InrTensor(2, 3, (3,), 1)], [(5, 4), (3, 6)], 77, 0.5
    limit = 0.49 if compat == "htty" else 0.5
    results = inr_weights(p, tensors, active, norm=NORM, noise=noise, seed=seed, compat=compat, activation="relu")
    for t, ((rows, cols), tensor) in enumerate(zip(active, tensors, strict=True)):
        v = coordinates(tensor, rows, cols, NORM, torch.float64)
        divisor = [tensor.layers, rows, cols, NORM, NORM, NORM]
        element = torch.arange(rows * cols)
        zero = torch.zeros_like(element)
        index = [zero, element // cols, element % cols, zero, zero, zero] if noise == "axis" else [element] * 6
        for axis in range(6):
            v[:, axis] += reference.noise_offsets(seed, 0, t, axis, index[axis], limit) / divisor[axis]
        double = [x.double() for x in p]
        w = evaluate(encode(v, 3, compat), double, tensor.mlp, "relu") / cols
        start = (9 - tensor.packed()[3]) // 2
        expected = w[:, start : start + tensor.packed()[3]].reshape(rows, cols, *tensor.kernel)
        assert error(results[t], expected) < 1e-5


def test_inr_weights_offsets_are_uniform_and_independent():
    index = torch.arange(1 << 15)
    draws = torch.stack(
        [reference.noise_offsets(3, k, t, axis, index, 0.5) for k, t, axis in [(0, 0, 1), (0, 0, 2), (1, 0, 1)]]
    )
    assert draws.min() >= -0.5
    assert draws.max() < 0.5
    assert draws.mean(1).abs().max() < 0.005
    assert (draws.var(1) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.02
    assert reference.noise_offsets(3, 0, 0, 1, index, 0.49).abs().max() == 0.49


@pytest.mark.parametrize("save", ["full", "recompute"])
@pytest.mark.parametrize("noise", ["axis", "element"])
def test_inr_weights_mean_of_samples_equals_mean_of_calls(noise, save):
    tensors, active, base, scale = target()
    p = InrParameters(*(t.requires_grad_() for t in networks(3)))
    options = {"norm": NORM, "base": base, "scale": scale, "noise": noise, "seed": 11, "save": save}
    dys = [torch.randn(tensor.shape(*pair)) for tensor, pair in zip(tensors, active, strict=True)]
    averaged = inr_weights(p, tensors, active, samples=4, first_sample=2, **options)
    grads = torch.autograd.grad(averaged, p, dys)
    calls = [inr_weights(p, tensors, active, first_sample=2 + k, **options) for k in range(4)]
    means = [sum(parts) / 4 for parts in zip(*calls, strict=True)]
    assert not torch.allclose(calls[0][0], calls[1][0])
    for actual, want in zip(averaged, means, strict=True):
        assert error(actual, want) < 1e-6
    for actual, want in zip(grads, torch.autograd.grad(means, p, dys), strict=True):
        assert error(actual, want) < 2e-6


@pytest.mark.parametrize("noise", ["none", "axis", "element"])
def test_inr_weights_kernel_gives_the_numbers_of_the_reference(noise):
    """Same seed, same offsets: the float32 kernel against the reference in float64."""
    tensors, active, base, scale = target()
    p = InrParameters(*(t.requires_grad_() for t in networks(3, 32)))
    dys = [torch.randn(tensor.shape(*pair)) for tensor, pair in zip(tensors, active, strict=True)]
    results = []
    for cast in (torch.float32, torch.float64):
        wide = InrParameters(*(t.to(cast) for t in p))
        out = inr_weights(
            wide,
            tensors,
            active,
            norm=NORM,
            base=[b.to(cast) for b in base],
            scale=scale.to(cast),
            noise=noise,
            seed=123,
            samples=2,
        )
        results.append([*out, *torch.autograd.grad(out, p, [dy.to(cast) for dy in dys])])
    for actual, want in zip(*results, strict=True):
        assert error(actual, want) < 1e-4


def test_inr_weights_is_deterministic():
    tensors, active, base, scale = target()
    p = InrParameters(*(t.requires_grad_() for t in networks(3, 32)))

    def run(threads):
        torch.set_num_threads(threads)
        try:
            out = inr_weights(p, tensors, active, norm=NORM, base=base, scale=scale, noise="axis", seed=9)
            return [*out, *torch.autograd.grad([o.sum() for o in out], p)]
        finally:
            torch.set_num_threads(1)

    for threads in (1, 2):
        for one, other in zip(run(threads), run(threads), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(run(1), run(2), strict=True):
        assert error(one, other) < 1e-5


@pytest.mark.parametrize(
    ("activation", "noise", "save"),
    [("elu", "none", "full"), ("gelu", "axis", "recompute"), ("silu", "axis", "full"), ("elu", "element", "recompute")],
)
def test_inr_weights_gradcheck(activation, noise, save):
    tensors = [InrTensor(0, 2, (2,)), InrTensor(1, 2, tile=(2, 1))]
    kwargs = {"norm": 8.0, "activation": activation, "noise": noise, "seed": 1, "samples": 2, "save": save}
    parameters, base, scale = networks(1, 3, 1, 1, 3), [torch.randn(3, 2, 2), torch.randn(3, 2)], torch.randn(2)
    check_gradients(
        lambda *a, **k: tuple(op(*a[:7], tensors, [(1, 2), (3, 1)], *a[7:], **k)), (*parameters, *base, scale), kwargs
    )


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("noise", ["none", "axis"])
def test_inr_weights_opcheck(noise, save):
    tensors, active, base, scale = target()
    p = [t.requires_grad_() for t in networks(3)]
    seed = torch.tensor(4) if noise == "axis" else None
    spec = [v for t in tensors for v in t.packed()]
    sizes = [v for pair in active for v in pair]
    options = (sizes, spec, "relu", "neumeta", NORM, noise, 0.5, 2, 0)
    args = (*p, scale.requires_grad_(), [b.requires_grad_() for b in base], seed, *options, torch.float32, save)
    torch.library.opcheck(torch.ops.slimkernels.inr_weights.default, args)
    with torch.no_grad():
        flat, saved = torch.ops.slimkernels.inr_weights.default(*args)
    backward = (torch.randn_like(flat), *(t.detach() for t in p), scale.detach(), seed, saved, *options)
    torch.library.opcheck(torch.ops.slimkernels.inr_weights_backward.default, backward)


def test_inr_weights_compiles_to_few_graphs():
    p = networks(2, 16)
    base = torch.randn(64, 64, 3, 3)

    def call(n, seed, base, *p):
        tensors = [InrTensor(0, 2, (3, 3), 0), InrTensor(1, 2, (), 1, "bias")]
        active = [(n, n + 1), (n, 1)]
        w, b = inr_weights(InrParameters(*p), tensors, active, norm=NORM, base=[base, None], noise="axis", seed=seed)
        return w, b

    leaves = [t.requires_grad_() for t in p]
    check_graphs(call, [(n, torch.tensor(n), base, *leaves) for n in range(3, 51, 4)])


def test_inr_weights_autocast_and_result_dtype():
    tensors, active, base, scale = target()
    p = InrParameters(*(t.requires_grad_() for t in networks(3)))
    plain = inr_weights(p, tensors, active, norm=NORM, dtype=torch.bfloat16)
    assert all(w.dtype == torch.bfloat16 for w in plain)
    with torch.autocast(DEVICE, torch.bfloat16):
        weights = inr_weights(p, tensors, active, norm=NORM, base=base, scale=scale)
    assert all(w.dtype == torch.float32 for w in weights)
    sum(w.sum() for w in weights).backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.abs().sum() > 0 for t in p)


def test_inr_weights_zero_output_layer_gives_the_sliced_base():
    tensors, active, base, _ = target()
    p = networks(3)
    p = p._replace(w_out=torch.zeros_like(p.w_out), b_out=torch.zeros_like(p.b_out))
    for w, b in zip(inr_weights(p, tensors, active, norm=NORM, base=base), base, strict=True):
        assert torch.equal(w, b[tuple(slice(0, size) for size in w.shape)])


def test_inr_weights_in_functional_call_and_inference_mode():
    conv = torch.nn.Conv2d(6, 4, 3)
    p = InrParameters(*(t.requires_grad_() for t in networks(2)))
    tensors = [InrTensor(0, 2, (3, 3), 0, "channels_last"), InrTensor(0, 2, (), 1, "bias")]
    w, b = inr_weights(p, tensors, [(4, 6), (4, 1)], norm=NORM)
    assert w.is_contiguous(memory_format=torch.channels_last)
    torch.func.functional_call(conv, {"weight": w, "bias": b}, (torch.randn(1, 6, 5, 5),)).sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in p)
    with torch.inference_mode():
        inr_weights(p, tensors, [(4, 6), (4, 1)], norm=NORM)


P = networks(2)
T = [InrTensor(0, 2, (3, 3)), InrTensor(1, 2, (), 1, "bias")]
A = [(4, 3), (4, 1)]


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((P, T, A[:1]), {}, ValueError, "expected active to have a multiple of 2 entries, one a tensor, got 1"),
        ((P, T, [(4, 3), (4, 2)]), {}, ValueError, r"active\[1\] to be \(C, 1\) for a bias, C >= 1, got \(4, 2\)"),
        ((P, T, [(0, 3), (4, 1)]), {}, ValueError, r"expected active\[0\] to be at least \(1, 1\), got \(0, 3\)"),
        ((P, [InrTensor(0, 2, mlp=2)], A[:1]), {}, ValueError, r"expected tensors\[0\].mlp between 0 and 1, got 2"),
        (
            (P, [InrTensor(0, 2, positions=(4, 0))], A[:1]),
            {},
            ValueError,
            r"expected tensors\[0\].positions to be two positive sizes, got \(4, 0\)",
        ),
        ((P, [InrTensor(0, 0)], A[:1]), {}, ValueError, r"expected tensors\[0\].layers to be at least 1, got 0"),
        ((P, [InrTensor(0, 2, (5, 5))], A[:1]), {}, ValueError, r"between 1 and 9 outputs .* got kernel \(5, 5\)"),
        ((P, [InrTensor(0, 2, layout="hwio")], A[:1]), {}, ValueError, "layout to be one of oihw, iohw.* got 'hwio'"),
        ((P, T, A), {"noise": "gauss"}, ValueError, "expected noise to be one of none, axis, element, got 'gauss'"),
        ((P, T, A), {"noise": "axis"}, ValueError, "expected seed to be given for noise 'axis', got None"),
        ((P, T, A), {"noise": "axis", "seed": torch.ones(1)}, ValueError, r"expected seed of shape \(\), got \(1,\)"),
        ((P, T, A), {"noise": "axis", "seed": torch.ones(())}, TypeError, "seed of dtype int64, got torch.float32"),
        ((P, T, A), {"compat": "nm"}, ValueError, "expected compat to be one of neumeta, htty, got 'nm'"),
        ((P, T, A), {"save": "half"}, ValueError, "expected save to be one of auto, full, recompute, got 'half'"),
        ((P, T, A), {"activation": "swish"}, ValueError, "expected activation to be one of none, relu"),
        ((P, T, A), {"samples": 0}, ValueError, "expected samples >= 1 and first_sample >= 0, got samples 0"),
        ((P, T, A), {"norm": 0.0}, ValueError, "expected norm to be positive, got 0.0"),
        ((P, T, A), {"dtype": torch.int64}, TypeError, "expected dtype float32, float64, bfloat16 or float16"),
        ((P, T, A), {"scale": torch.ones(3)}, ValueError, r"expected scale of shape \(2,\), got \(3,\)"),
        ((P, T, A), {"scale": torch.ones(2).double()}, TypeError, "expected scale of dtype torch.float32"),
        ((P, T, A), {"base": [None]}, ValueError, "expected base of 2 entries, one a tensor, got 1"),
        ((P, T, A), {"base": [torch.ones(3, 3, 3, 3), None]}, ValueError, r"base\[0\] to contain a slice of shape"),
        ((P, T, A), {"base": [None, torch.ones(4, 1)]}, ValueError, r"base\[1\] to contain a slice of shape \(4,\)"),
        (
            (P, T, A),
            {"base": [torch.ones(4, 3, 3, 3).double(), None], "dtype": torch.float32},
            TypeError,
            r"expected base\[0\] of dtype torch.float32 like the result, got torch.float64",
        ),
        ((P, T, A), {"base": [torch.ones(4, 3, 3, 3, device="meta"), None]}, ValueError, r"base\[0\] on device cpu"),
        ((P._replace(w_in=P.w_in[..., :7]), T, A), {}, ValueError, r"w_in of shape \(P, H, 6 \+ 12 \* bands\), got"),
        ((P._replace(w_in=P.w_in.long()), T, A), {}, TypeError, "expected w_in of dtype float32, float64"),
        ((P._replace(w_in=None), T, A), {}, TypeError, "expected w_in to be a Tensor, got NoneType"),
        ((P._replace(b_in=P.b_in[:, :3]), T, A), {}, ValueError, r"expected b_in of shape \(2, 16\), got \(2, 3\)"),
        ((P._replace(skip=P.skip[0]), T, A), {}, ValueError, "expected skip to have 2 dimensions"),
        ((P._replace(w_out=P.w_out.double()), T, A), {}, TypeError, "expected w_out of dtype torch.float32"),
    ],
)  # fmt: skip
def test_inr_weights_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        inr_weights(*args, **({"norm": NORM} | kwargs))


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40 + 5, -(2**62)])
def test_inr_weights_offsets_are_the_same_for_a_seed_that_is_a_tensor(seed):
    """A seed on a GPU is not read back: all arithmetic on it is that of tensors."""
    index = torch.arange(50)
    expected = reference.noise_offsets(seed, 2, 1, 1, index, 0.5)
    assert torch.equal(reference.noise_offsets(torch.tensor(seed), 2, 1, 1, index, 0.5), expected)
