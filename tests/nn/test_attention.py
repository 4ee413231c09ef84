import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations

from slimkernels.nn import AnySizeMultiheadAttention, SlimLinear, SlimMultiheadAttention
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id, error

E, H, N, L, S = 24, 4, 2, 5, 7
CLASSES = (SlimMultiheadAttention, AnySizeMultiheadAttention)

# Options of the constructor, and what the layer is called on: x alone, a query and keys, or three tensors.
LAYERS = {
    "packed": ({}, "self"),
    "packed-cross": ({}, "cross"),
    "packed-three": ({}, "three"),
    "batch-first": ({"batch_first": True}, "self"),
    "batch-first-cross": ({"batch_first": True}, "cross"),
    "no-bias": ({"bias": False}, "self"),
    "no-bias-cross": ({"bias": False}, "cross"),
    "bias-kv": ({"add_bias_kv": True}, "self"),
    "zero-attn": ({"add_zero_attn": True, "batch_first": True}, "three"),
    "both": ({"add_bias_kv": True, "add_zero_attn": True, "bias": False}, "cross"),
    "kdim-vdim": ({"kdim": 10, "vdim": 6}, "three"),
    "kdim": ({"kdim": 10, "bias": False, "add_bias_kv": True}, "three"),
}

CAUSAL = torch.triu(torch.ones(L, L, dtype=torch.bool), 1)
# Arguments of the call, for L steps and k keys.
CALLS = {
    "plain": lambda k: {"need_weights": False},
    "weights": lambda k: {},
    "weights-of-heads": lambda k: {"average_attn_weights": False},
    "bool-mask": lambda k: {"need_weights": False, "attn_mask": torch.arange(L * k).view(L, k) % 3 == 1},
    "float-mask": lambda k: {"attn_mask": fixed(L, k)},
    "masks-of-heads": lambda k: {"need_weights": False, "attn_mask": fixed(N * H, L, k)},
    "padding": lambda k: {"need_weights": False, "key_padding_mask": torch.arange(k).expand(N, k) >= k - 2},
    "both-masks": lambda k: {"attn_mask": fixed(L, k), "key_padding_mask": fixed(N, k)},
}


def fixed(*shape: int) -> Tensor:
    """Numbers that are not differentiated."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    made.no_grad = True  # type: ignore[attr-defined]
    return made


def pair(cls=SlimMultiheadAttention, **options):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(0)
    other = cls(E, H, **options)
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[key]) for key, t in plain.state_dict().items())
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other.load_state_dict(plain.state_dict(), strict=True)
    return plain, other


def inputs(plain: nn.MultiheadAttention, form: str) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    k = S if form != "self" else L
    made = [torch.randn(L, N, E), torch.randn(k, N, plain.kdim), torch.randn(k, N, plain.vdim)]
    made = made[: {"self": 1, "cross": 2, "three": 3}[form]]
    return tuple(t.transpose(0, 1).contiguous() if plain.batch_first else t for t in made)


def on(given: tuple) -> tuple:
    """Query, key and value: the same tensor where fewer are given."""
    return (*given, *given[-1:] * (3 - len(given)))


def through(module, count):
    names = [name for name, _ in module.named_parameters()]

    def call(*args, **kwargs):
        parameters = dict(zip(names, args[count:], strict=True))
        outputs = torch.func.functional_call(module, parameters, on(args[:count]), kwargs)
        return tuple(y for y in outputs if y is not None)

    return call


def compare(other, plain, given, kwargs, dtype):
    args = (*given, *plain.parameters())
    check_as_good_as_pytorch(through(other, len(given)), through(plain, len(given)), args, kwargs, dtype)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layer", LAYERS)
def test_at_full_width_it_is_torchs_layer(layer, call, cls):
    options, form = LAYERS[layer]
    plain, other = pair(cls, **options)
    given = inputs(plain, form)
    compare(other, plain, given, CALLS[call](L if form == "self" else S), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("layer", "call"), [("packed", "plain"), ("packed-cross", "float-mask"), ("both", "weights")])
def test_at_full_width_it_is_torchs_layer_in_every_dtype(layer, call, dtype):
    options, form = LAYERS[layer]
    plain, slim = pair(**options)
    compare(slim, plain, inputs(plain, form), CALLS[call](L if form == "self" else S), dtype)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_unbatched_and_in_eval_mode(cls, need_weights):
    plain, other = pair(cls)
    x = torch.randn(L, E)
    mask = {"attn_mask": CAUSAL, "is_causal": True, "need_weights": need_weights}
    compare(other, plain, (x,), mask, torch.float32)
    compare(other, plain, inputs(plain, "self"), mask, torch.float32)
    compare(other, plain, (x,), {"key_padding_mask": torch.arange(L) > 3, "need_weights": need_weights}, torch.float32)
    plain, other = pair(cls, batch_first=True)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        for mode in (True, False):
            ours, torchs = (m.train(mode)(x, x, x, need_weights=need_weights) for m in (other, plain))
            assert error(ours[0], torchs[0]) < 1e-6
            assert ours[1] is torchs[1] is None if not need_weights else error(ours[1], torchs[1]) < 1e-6


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_torch_draws(need_weights):
    plain, slim = pair(dropout=0.4)
    (x,) = inputs(plain, "self")
    found = []
    for module in (plain, slim):
        torch.manual_seed(7)
        found.append(module(x, x, x, need_weights=need_weights)[0])
    assert error(found[1], found[0]) < 1e-6
    assert error(slim.eval()(x, x, x)[0], found[0]) > 0.1


def hand_sliced(plain, heads, features, out, kdim=None, vdim=None):
    """A layer of that size with the weights of the first heads and features: the reference for a width."""
    d = plain.head_dim
    rows = torch.arange(heads * d)
    packed = torch.cat([rows, E + rows, 2 * E + rows])
    state = {}
    for key, t in plain.state_dict().items():
        if key == "in_proj_weight":
            t = t[packed][:, :features]
        elif key == "in_proj_bias":
            t = t[packed]
        elif key.endswith("proj_weight"):
            t = t[rows][:, : {"q": features, "k": kdim, "v": vdim}[key[0]]]
        elif key == "out_proj.weight":
            t = t[:out, : heads * d]
        elif key == "out_proj.bias":
            t = t[:out]
        else:  # bias_k, bias_v
            t = t[..., : heads * d]
        state[key] = t
    options = {
        "bias": plain.in_proj_bias is not None,
        "add_bias_kv": plain.bias_k is not None,
        "add_zero_attn": plain.add_zero_attn,
        "batch_first": plain.batch_first,
    }
    if plain.in_proj_weight is None:
        options |= {"kdim": kdim, "vdim": vdim}
    if features == out == heads * d:
        made: nn.MultiheadAttention = nn.MultiheadAttention(features, heads, **options)
    else:
        made = AnySizeMultiheadAttention(features, heads, head_dim=d, out_dim=out, **options)
    made.load_state_dict(state, strict=True)
    return made


# Heads, features of the query and features put out: the sizes of nn.MultiheadAttention, and others.
SIZES = [(2, 12, 12), (1, 6, 6), (3, 18, 18), (2, 24, 24), (1, 13, 24), (4, 9, 24), (3, 24, 7)]


@pytest.mark.parametrize(("heads", "features", "out"), SIZES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_width_is_a_hand_sliced_layer(layer, heads, features, out):
    options, form = LAYERS[layer]
    plain, slim = pair(**options)
    kdim, vdim = (5, 6) if plain.in_proj_weight is None else (features, features)
    kdim, vdim = min(kdim, plain.kdim), min(vdim, plain.vdim)
    cut = hand_sliced(plain, heads, features, out, kdim, vdim)
    slim.set_width(heads * slim.head_dim)
    slim.out_proj.set_width(out)
    assert slim.heads == heads
    given = tuple(t[..., :n] for t, n in zip(inputs(plain, form), (features, kdim, vdim), strict=False))
    for kwargs in ({"need_weights": False}, {"average_attn_weights": False}):
        slim.zero_grad()
        cut.zero_grad()
        found = []
        for module in (slim, cut):
            y, weights = module(*on(given), **kwargs)
            (y.square().sum() + (0 if weights is None else weights.square().sum())).backward()
            found.append((y, weights))
        assert error(found[0][0], found[1][0]) < 1e-6
        if found[0][1] is not None:
            assert found[0][1].shape[1] == heads
            assert error(found[0][1], found[1][1]) < 1e-6
        ours = dict(slim.named_parameters())
        for key, p in cut.named_parameters():
            full = ours[key].grad
            assert abs(full.norm() - p.grad.norm()) <= 1e-5 * (1 + p.grad.norm()), key  # nothing outside the slice
            if key == "in_proj_weight":
                full = full.view(3, E, E)[:, : heads * slim.head_dim, :features].flatten(0, 1)
            elif key == "in_proj_bias":
                full = full.view(3, E)[:, : heads * slim.head_dim].flatten()
            else:
                full = full[tuple(slice(0, n) for n in p.shape)]
            assert error(full, p.grad) < 1e-5 or p.grad.norm() < 1e-6, key


def test_masks_of_heads_are_those_of_the_active_ones():
    _, slim = pair(batch_first=True)
    slim.set_width(12)
    x, mask = torch.randn(N, L, E), fixed(N * 2, L, L)
    assert slim(x, x, x, attn_mask=mask, average_attn_weights=False)[1].shape == (N, 2, L, L)
    whole = torch.cat([torch.cat([mask[i : i + 2], fixed(2, L, L)]) for i in (0, 2)])  # for all heads
    assert torch.equal(slim(x, x, x, attn_mask=whole)[0], slim(x, x, x, attn_mask=mask)[0])
    with pytest.raises(ValueError, match=r"expected attn_mask of shape \(4, 5, 5\), got \(6, 5, 5\)"):
        slim(x, x, x, attn_mask=fixed(N * 3, L, L))


def test_inputs_listed_by_in_index():
    plain, slim = pair()
    index = torch.tensor([0, 1, 2, 3, 12, 13, 14])
    slim.in_index = index
    x, k = torch.randn(L, N, 7), torch.randn(S, N, 7)
    full = [torch.zeros(*t.shape[:2], E).index_copy(2, index, t) for t in (x, k)]
    assert error(slim(x, x, x)[0], plain(full[0], full[0], full[0])[0]) < 1e-6
    assert error(slim(x, k, k)[0], plain(full[0], full[1], full[1])[0]) < 1e-6


@pytest.mark.parametrize("mode", ["autocast", "grad_is_off"])
def test_autocast_and_inference(mode):
    plain, slim = pair(batch_first=True)
    x = torch.randn(N, L, E)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), torch.inference_mode(mode != "autocast"):
        ours, torchs = slim(x, x, x), plain(x, x, x)
    assert ours[0].dtype == torchs[0].dtype
    assert error(ours[0], torchs[0]) < (2e-2 if mode == "autocast" else 1e-6)


def test_torchs_transformer_layers_do_not_read_its_weights_past_it():
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True).eval()
    layer.self_attn = pair(batch_first=True)[1].eval()
    layer.self_attn.set_width(12)
    x, padding = torch.randn(N, L, E), torch.arange(L).expand(N, L) > 3
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.no_grad():
            ours = encoder(x, src_key_padding_mask=padding)
            torch.backends.mha.set_fastpath_enabled(False)
            expected = encoder(x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert torch.equal(ours, expected)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        assert nn.TransformerEncoder(layer, 2).use_nested_tensor is False


def test_two_graphs_for_all_widths():
    slim = pair(batch_first=True)[1]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(slim, backend=counter, fullgraph=True)
    for heads, features in [(4, 24), (2, 12), (3, 18), (1, 6), (2, 24), (3, 12)]:
        slim.set_width(heads * slim.head_dim)
        slim.out_proj.set_width(features)
        x = torch.randn(N, L, features, requires_grad=True)
        found = []
        for module in (slim, compiled):
            (y,) = module(x, x, x, need_weights=False)[:1]
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, slim.in_proj_weight, slim.out_proj.weight])))
        for ours, eager in zip(*found, strict=True):
            assert error(ours, eager) < 1e-6
    assert counter.frame_count <= 3


def test_copies_and_parametrizations():
    plain, slim = pair()
    (x,) = inputs(plain, "self")
    slim.set_width(12)
    copied = copy.deepcopy(slim)
    assert copied.width == 12
    assert torch.equal(copied(x, x, x)[0], slim(x, x, x)[0])
    slim.set_width(None)
    for module in (plain, slim):
        parametrizations.weight_norm(module.out_proj)
        parametrizations.weight_norm(module, "in_proj_weight")
    assert error(slim(x, x, x)[0], plain(x, x, x)[0]) < 1e-6


def test_width_is_checked_and_shown():
    slim = SlimMultiheadAttention(24, 4)
    slim.set_width(12)
    assert isinstance(slim, nn.MultiheadAttention)
    assert isinstance(slim.out_proj, SlimLinear)
    assert "embed_dim=24, num_heads=4, head_dim=6, width=12" in repr(slim)
    slim.set_width(None)
    assert slim.width == slim.full_width == 24
    for width in (0, 25, 2.5):
        with pytest.raises(ValueError, match=f"SlimMultiheadAttention: expected a width between 1 and 24, got {width}"):
            slim.set_width(width)
    for width in (5, 13):
        with pytest.raises(ValueError, match=f"expected a width of whole heads, a multiple of head_dim=6, got {width}"):
            slim.set_width(width)
    with pytest.raises(ValueError, match="AnySizeMultiheadAttention: expected out_dim of at least 1, got 0"):
        AnySizeMultiheadAttention(24, 4, out_dim=0)


def _bad():
    x, k = torch.randn(L, N, E), torch.randn(S, N, E)
    yield (x[None], x, x), {}, ValueError, r"expected query to have 2 or 3 dimensions, got shape \(1, 5, 2, 24\)"
    yield (x, k[:, 0], k[:, 0]), {}, ValueError, "expected key and value of the same steps with 3 dimensions like query"
    yield (x, k, k[:3]), {}, ValueError, r"got shapes \(7, 2, 24\) and \(3, 2, 24\)"
    yield (x, k[:, :1], k[:, :1]), {}, ValueError, "expected key of batch 2 like query, got 1"
    yield (x, k[..., :6], k[..., :6]), {}, ValueError, "of one number of features, got 24, 6, 6"
    yield (x, x, x), {"is_causal": True}, ValueError, "expected attn_mask with is_causal=True, got none"
    yield (x, k, k), {"attn_mask": fixed(L, L)}, ValueError, r"expected attn_mask of shape \(5, 7\), got \(5, 5\)"
    yield (x, k, k), {"attn_mask": fixed(1, L, S)}, ValueError, r"expected attn_mask of shape \(8, 5, 7\), got"
    yield (x, k, k), {"key_padding_mask": fixed(N, L)}, ValueError, r"expected key_padding_mask of shape \(2, 7\)"
    mask = torch.zeros(L, S, dtype=torch.int64)
    yield (x, k, k), {"attn_mask": mask}, TypeError, "expected attn_mask of bool or floating point, got torch.int64"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("case", range(10))
def test_wrong_arguments(cls, case):
    args, kwargs, kind, message = list(_bad())[case]
    with pytest.raises(kind, match=f"{cls.__name__}: .*{message}"):
        pair(cls)[1](*args, **kwargs)


def test_what_the_ops_reject():
    slim = pair()[1]
    with pytest.raises(ValueError, match=r"slim_linear: expected x.shape\[-1\] between 1 and 24, got 25"):
        slim(*3 * (torch.randn(L, N, 25),))
    with pytest.raises(
        TypeError, match=r"slim_linear: expected weight of dtype torch\.float64 like x, got torch\.float32"
    ):
        slim(*3 * (torch.randn(L, N, E, dtype=torch.float64),))
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(4, E)], layout=torch.jagged)
    with pytest.raises(ValueError, match="expected padded tensors with a key_padding_mask, got a nested tensor"):
        slim(nested, nested, nested)
