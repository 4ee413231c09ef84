import pytest
import torch
from torch import _VF

from slimkernels.ops import slim_gru
from tests.helpers import (
    DEVICE,
    DEVICES,
    DTYPES,
    ODD_SIZES,
    check_as_good_as_pytorch,
    check_gradients,
    check_graphs,
    dtype_id,
    error,
    layouts,
)

GATES = 3


def cut(weights, h, i, *, layers=1, directions=1, in_blocks=1):
    """Flat weights of the plain network of that width, as slices of the full ones."""
    per = len(weights) // (layers * directions)
    result = []
    for start in range(0, len(weights), per):
        part = weights[start : start + per]
        blocks, active = (in_blocks, i) if start < per * directions else (directions, directions * h)
        w_ih = torch.cat([b[:, : active // blocks] for b in part[0].chunk(blocks, 1)], 1)
        result.append(w_ih.unflatten(0, (GATES, -1))[:, :h].flatten(0, 1))
        result.append(part[1].unflatten(0, (GATES, -1))[:, :h, :h].flatten(0, 1))
        if per >= 4:
            result += [b.unflatten(0, (GATES, -1))[:, :h].flatten() for b in part[2:4]]
    return result


def oracle(x, weights, h, h0=None, *, num_layers=1, bidirectional=False, in_blocks=1, sizes=None):
    d = 2 if bidirectional else 1
    flat = cut(weights, h, x.shape[-1], layers=num_layers, directions=d, in_blocks=in_blocks)
    batch = x.shape[1] if sizes is None else int(sizes[0])
    if h0 is None:
        h0 = x.new_zeros(num_layers * d, batch, h)
    bias = len(weights) // (num_layers * d) >= 4
    if sizes is None:
        return _VF.gru(x, h0, flat, bias, num_layers, 0.0, True, bidirectional, False)
    return _VF.gru(x, sizes, h0, flat, bias, num_layers, 0.0, True, bidirectional)


def ours(x, weights, h, h0=None, *, sizes=None, **kwargs):
    return slim_gru(x, weights, h, h0, batch_sizes=sizes, **kwargs)


def make_weights(full_h, full_i, *, layers=1, directions=1, bias=True):
    found = []
    scale = full_h**-0.5
    for layer in range(layers):
        for _ in range(directions):
            found.append(torch.randn(GATES * full_h, directions * full_h if layer else full_i) * scale)
            found.append(torch.randn(GATES * full_h, full_h) * scale)
            if bias:
                found += [torch.randn(GATES * full_h) * 0.5, torch.randn(GATES * full_h) * 0.5]
    return found


def sample(steps, batch, i, h, full_i, full_h, *, state=True, layers=1, directions=1, bias=True):
    weights = make_weights(full_h, full_i, layers=layers, directions=directions, bias=bias)
    args = [torch.randn(steps, batch, i), weights, h]
    if state:
        args.append(torch.randn(layers * directions, batch, h))
    kwargs = {"num_layers": layers, "bidirectional": directions == 2}
    return tuple(args), kwargs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_slim_gru_odd_sizes(size, dtype, device):
    for steps, batch, i, h in [(4, 3, 9, size), (3, 2, size, 7), (2, size, 6, 5), (size, 2, 4, 3)]:
        args, kwargs = sample(steps, batch, i, h, i + 3, h + 5)
        check_as_good_as_pytorch(ours, oracle, args, kwargs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("h", [1, 40])
def test_slim_gru_short_and_small(steps, batch, h, dtype):
    for state in (True, False):
        args, kwargs = sample(steps, batch, 13, h, 16, 48, state=state)
        check_as_good_as_pytorch(ours, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("directions", [1, 2])
def test_slim_gru_layers_and_directions(directions, bias, dtype):
    args, kwargs = sample(6, 4, 10, 12, 14, 20, layers=2, directions=directions, bias=bias)
    check_as_good_as_pytorch(ours, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("h", [64, 96, 100])
def test_slim_gru_many_rows(h, dtype):
    """Several chunks of steps and several panels of hidden units."""
    args, kwargs = sample(37, 20, 48, h, 48, 100, directions=2)
    check_as_good_as_pytorch(ours, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", [[4, 4, 3, 1, 1], [1], [3, 2], [19, 19, 7, 7, 7, 2, 1]])
def test_slim_gru_packed(sizes, directions, dtype):
    (_, weights, h, h0), kwargs = sample(1, sizes[0], 9, 11, 12, 16, layers=2, directions=directions)
    x = torch.randn(sum(sizes), 9)
    args = (x, weights, h, h0)
    check_as_good_as_pytorch(ours, oracle, args, kwargs | {"sizes": torch.tensor(sizes, device="cpu")}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_gru_in_blocks(dtype):
    args, kwargs = sample(5, 3, 10, 6, 16, 8, directions=2)
    check_as_good_as_pytorch(ours, oracle, args, kwargs | {"in_blocks": 2}, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_slim_gru_layouts(device):
    (x, weights, h, h0), kwargs = sample(5, 3, 12, 10, 16, 14)
    for at in range(4):
        for _, layout in layouts(weights[at]):
            changed = [*weights[:at], layout, *weights[at + 1 :]]
            check_as_good_as_pytorch(ours, oracle, (x, changed, h, h0), kwargs, torch.float32, device)
    for _, layout in layouts(x):
        check_as_good_as_pytorch(ours, oracle, (layout, weights, h, h0), kwargs, torch.float32, device)
    for _, layout in layouts(h0):
        check_as_good_as_pytorch(ours, oracle, (x, weights, h, layout), kwargs, torch.float32, device)


def test_slim_gru_batch_of_zero():
    args, kwargs = sample(3, 0, 4, 5, 6, 8)
    y, h_n = ours(*args, **kwargs)
    assert y.shape == (3, 0, 5)
    assert h_n.shape == (1, 0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_gru_streaming_equals_batch_processing(dtype):
    weights = [w.to(dtype) for w in make_weights(24, 20, layers=2)]
    x = torch.randn(30, 1, 17).to(dtype)
    with torch.inference_mode():
        y, h_n = slim_gru(x, weights, 19, num_layers=2)
        state, steps = None, []
        for t in range(30):
            step, state = slim_gru(x[t : t + 1], weights, 19, state, num_layers=2)
            steps.append(step)
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert error(torch.cat(steps), y) <= limit
    assert error(state, h_n) <= limit


def test_slim_gru_recompute_gives_the_same_gradients():
    x, weights = torch.randn(6, 3, 8), [w.requires_grad_() for w in make_weights(12, 10, directions=2)]
    grads = []
    for recompute in (False, True):
        y, h_n = slim_gru(x, weights, 9, bidirectional=True, recompute=recompute)
        loss = y.square().sum() + h_n.sum()
        grads.append(torch.autograd.grad(loss, weights))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_slim_gru_directions_side_by_side_give_the_same_result():
    x, weights = torch.randn(9, 20, 8), [w.requires_grad_() for w in make_weights(12, 10, directions=2)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            y, _ = slim_gru(x, weights, 9, bidirectional=True)
            results.append([y, *torch.autograd.grad(y.square().sum(), weights)])
        finally:
            torch.set_num_threads(1)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_slim_gru_dropout_between_layers():
    x, weights = torch.randn(6, 3, 8), make_weights(12, 10, layers=2)
    plain, _ = slim_gru(x, weights, 9, num_layers=2)
    dropped, _ = slim_gru(x, weights, 9, num_layers=2, dropout=0.5)
    assert not torch.equal(plain, dropped)
    first, _ = slim_gru(x, weights[:4], 9)
    torch.manual_seed(3)
    dropped, _ = slim_gru(x, weights, 9, num_layers=2, dropout=0.5)
    torch.manual_seed(3)
    expected, _ = slim_gru(torch.nn.functional.dropout(first, 0.5), weights[4:], 9)
    assert error(dropped, expected) < 1e-6  # few rows without gradients: other kernels


@pytest.mark.parametrize("directions", [1, 2])
def test_slim_gru_gradcheck(directions):
    (x, weights, h, h0), kwargs = sample(3, 2, 3, 3, 4, 4, directions=directions)

    def flat(x, h0, *weights):
        return ours(x, weights, h, h0, **kwargs)

    check_gradients(flat, (x, h0, *weights), {})


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_slim_gru_opcheck(directions, save):
    weights = [w.requires_grad_() for w in make_weights(8, 6, directions=directions)]
    x = torch.randn(3, 2, 5, requires_grad=True)
    h0 = torch.randn(directions, 2, 7, requires_grad=True)
    args = (x, h0, weights, None, directions == 2, 7, 1, save)
    torch.library.opcheck(torch.ops.slimkernels.slim_gru.default, args)
    with torch.no_grad():
        y, h_n, gates = torch.ops.slimkernels.slim_gru.default(*args[:-1], True)
    frozen = [w.detach() for w in weights]
    torch.library.opcheck(
        torch.ops.slimkernels.slim_gru_backward.default,
        (
            torch.randn_like(y),
            torch.randn_like(h_n),
            x.detach(),
            h0.detach(),
            frozen,
            None,
            y,
            gates,
            directions == 2,
            7,
            1,
            True,
            True,
            True,
        ),
    )


def test_slim_gru_compiles_to_few_graphs():
    weights = [w.requires_grad_() for w in make_weights(64, 48, layers=2, directions=2)]

    def call(x, h):
        return slim_gru(x, weights, h, num_layers=2, bidirectional=True)[0]

    check_graphs(call, [(torch.randn(3, 2, h, requires_grad=True), h + 3) for h in range(4, 40, 3)])


def test_slim_gru_autocast_runs_in_the_autocast_dtype():
    weights = [w.requires_grad_() for w in make_weights(8, 6)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y, h_n = slim_gru(torch.randn(3, 2, 5), weights, 7, torch.randn(1, 2, 7))
    assert y.dtype == h_n.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weights[1].grad.dtype == torch.float32
    active = weights[1].grad.unflatten(0, (3, 8))
    assert active[:, :7, :7].abs().sum() > 0
    assert active[:, 7:].abs().sum() == active[:, :, 7:].abs().sum() == 0


X, W = torch.randn(3, 2, 5), make_weights(8, 6)
S = torch.tensor([2, 1])  # on the CPU, as PyTorch has batch sizes


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((X, W, 9), {}, ValueError, "slim_gru: expected hidden_size between 1 and 8, got 9"),
        ((X, W, 0), {}, ValueError, "slim_gru: expected hidden_size between 1 and 8, got 0"),
        ((torch.randn(3, 2, 7), W, 8), {}, ValueError, r"expected x.shape\[-1\] between 1 and 6, got 7"),
        ((X, W, 8), {"in_blocks": 4}, ValueError, "expected in_blocks to divide the full input size 6, got 4"),
        ((X, W, 8), {"in_blocks": 2}, ValueError, r"expected x.shape\[-1\] to be a multiple of in_blocks=2, got 5"),
        ((X[0], W, 8), {}, ValueError, r"expected x to have 3 dimensions \(steps, batch, i\), got shape \(2, 5\)"),
        ((X[:0], W, 8), {}, ValueError, r"expected x to have at least 1 step, got shape \(0, 2, 5\)"),
        ((X, W[:1], 8), {}, ValueError, "expected weights to hold 2, 4 tensors for each of 1 layers x 1 directions"),
        ((X, W, 8), {"num_layers": 3}, ValueError, "for each of 3 layers x 1 directions, got 4 tensors"),
        ((X, [W[0], W[1][:-1], *W[2:]], 8), {}, ValueError, r"expected w_hh of shape \(3 \* H, P\), got \(23, 8\)"),
        ((X, [W[0], W[1][:, :7], *W[2:]], 8), {}, ValueError, r"expected w_hh of shape \(24, 8\), got \(24, 7\)"),
        ((X, [W[0][:-1], *W[1:]], 8), {}, ValueError, r"expected w_ih of shape \(24, I\), got \(23, 6\)"),
        (
            (X, [*W, *W], 8),
            {"num_layers": 2},
            ValueError,
            r"expected w_ih of layer 1 of shape \(24, 8\), got \(24, 6\)",
        ),
        ((X, [*W[:2], W[2][:5], W[3]], 8), {}, ValueError, r"expected b_ih of shape \(24,\), got \(5,\)"),
        ((X, [*W[:3], W[3][:5]], 8), {}, ValueError, r"expected b_hh of shape \(24,\), got \(5,\)"),
        ((X, W, 7, X), {}, ValueError, r"expected h0 of shape \(1, 2, 7\), got \(3, 2, 5\)"),
        ((X[0], W, 7), {"batch_sizes": S}, ValueError, "expected batch_sizes to sum to the 2 rows of x, got 3"),
        ((X, W, 7), {"batch_sizes": S}, ValueError, "expected packed x to have 2 dimensions"),
        ((X[0], W, 7), {"batch_sizes": S.flip(0)}, ValueError, r"\(no empty sequence\), got \[1, 2\]"),
        ((X[0], W, 7), {"batch_sizes": S * 0}, ValueError, r"\(no empty sequence\), got \[0, 0\]"),
        ((X[0], W, 7), {"batch_sizes": S[:0]}, ValueError, r"\(no empty sequence\), got \[\]"),
        ((X[0], W, 7), {"batch_sizes": S.int()}, TypeError, "expected batch_sizes of dtype torch.int64 on the CPU"),
        ((X, W, 7), {"dropout": 1.5}, ValueError, "expected dropout between 0 and 1, got 1.5"),
        (
            (X, [W[0].bfloat16(), *W[1:]], 8),
            {},
            TypeError,
            "expected weights of dtype torch.float32 like x, got torch.bf",
        ),
        ((X.long(), W, 8), {}, TypeError, "expected x of dtype float32, float64, bfloat16 or float16"),
    ],
)
def test_slim_gru_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        slim_gru(*args, **kwargs)
