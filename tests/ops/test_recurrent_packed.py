"""Packed weights that calls without gradients keep: every cell, dtype, direction and batch, as good as PyTorch and up to date."""

import pytest
import torch

from slimkernels.nn import SlimGRU, SlimLSTM
from slimkernels.ops import slim_gru, slim_lstm
from tests.helpers import DTYPES, dtype_id, error
from tests.ops import test_slim_gru, test_slim_lstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = {"lstm": (slim_lstm, test_slim_lstm), "gru": (slim_gru, test_slim_gru)}
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in flat(part)]


def run(kind, x, weights, h, state=None, **options):
    return flat(KINDS[kind][0](x, weights, h, state, **options))


def oracle(kind, x, weights, h, state=None, **options):
    return flat(KINDS[kind][1].oracle(x, weights, h, *([] if state is None else flat(state)), **options))


def states(kind, count, batch, h, p=None):
    h0 = torch.randn(count, batch, p or h)
    return (h0, torch.randn(count, batch, h)) if kind == "lstm" else h0


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) else type(value)(cast(part, dtype) for part in value)


def check(kind, x, weights, h, state=None, **options):
    """Twice, as the second call of many rows is the first to keep its weights."""
    dtype = x.dtype
    exact = oracle(
        kind, *cast([x, weights], torch.float64), h, None if state is None else cast(state, torch.float64), **options
    )
    theirs = oracle(kind, x, weights, h, state, **options)
    calls = [run(kind, x, weights, h, state, **options) for _ in range(3)]
    for found in calls:
        assert all(torch.equal(a, b) for a, b in zip(found, calls[0], strict=True))
        a, b, e = (torch.cat([t.flatten() for t in parts]) for parts in (found, theirs, exact))
        assert error(a, e) <= 2 * error(b, e) + FLOOR[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    ("steps", "batch"), [(1, 1), (3, 1), (1, 2), (1, 5), (1, 18), (2, 3), (30, 1), (7, 4), (3, 19)]
)
@torch.no_grad()
def test_as_good_as_pytorch(kind, dtype, directions, steps, batch):
    for h, i, layers, bias in ((1, 3, 1, True), (17, 9, 2, True), (33, 65, 1, False), (13, 16, 3, True)):
        weights = KINDS[kind][1].make_weights(h + 4, i + 3, layers=layers, directions=directions, bias=bias)
        weights = cast(weights, dtype)
        x, start = cast([torch.randn(steps, batch, i), states(kind, layers * directions, batch, h)], dtype)
        options = {"num_layers": layers, "bidirectional": directions == 2}
        check(kind, x, weights, h, start, **options)
        check(kind, x, weights, h, **options)


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (4, 1), (1, 3), (1, 20), (9, 20)])
@torch.no_grad()
def test_projections(steps, batch):
    for h, p, directions in ((13, 7, 1), (70, 65, 2), (16, 1, 2)):
        weights = test_slim_lstm.make_weights(h + 3, 12, layers=2, directions=directions, full_proj=p + 2)
        x, start = torch.randn(steps, batch, 10), states("lstm", 2 * directions, batch, h, p)
        options = {"num_layers": 2, "bidirectional": directions == 2, "proj_size": p}
        check("lstm", x, weights, h, start, **options)
        check("lstm", x, weights, h, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 4), (5, 17)])
@torch.no_grad()
def test_input_blocks_and_rows_apart(kind, steps, batch):
    weights = KINDS[kind][1].make_weights(16, 12, layers=2, directions=2)
    options = {"num_layers": 2, "bidirectional": True}
    check(kind, torch.randn(steps, batch, 10), weights, 13, in_blocks=2, **options)
    check(kind, torch.randn(steps, batch, 20)[..., ::2], weights, 13, **options)


CHANGES = {
    "in place": lambda w: w.mul_(0.5),
    "one element": lambda w: w[w.shape[0] // 2].add_(1.0),
    "data": lambda w: w.data.mul_(0.5),
    "other storage": lambda w: setattr(w, "data", w.data * 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@torch.no_grad()
def test_changed_weights_are_packed_again(kind, change, dtype):
    weights = cast(KINDS[kind][1].make_weights(24, 20, layers=2, directions=2), dtype)
    options = {"num_layers": 2, "bidirectional": True}
    for steps, batch in ((1, 1), (1, 4), (4, 17)):
        x = torch.randn(steps, batch, 20).to(dtype)
        for which in (0, 5, len(weights) - 1):
            check(kind, x, weights, 17, **options)
            CHANGES[change](weights[which])
        check(kind, x, weights, 17, **options)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_widths_and_shapes_of_the_same_weights_are_kept_apart(kind):
    weights = KINDS[kind][1].make_weights(40, 30, layers=2)
    for _ in range(3):
        for h, i in ((40, 30), (17, 30), (17, 11), (1, 1)):
            for steps, batch in ((1, 1), (1, 2), (2, 16), (30, 2), (4, 16), (4, 9)):
                x = torch.randn(steps, batch, i)
                expected = oracle(kind, x.double(), cast(weights, torch.float64), h, num_layers=2)
                for a, e in zip(run(kind, x, weights, h, num_layers=2), expected, strict=True):
                    assert error(a, e) < 1e-6


@pytest.mark.parametrize("slim", [SlimLSTM, SlimGRU])
def test_training_between_two_calls(slim):
    torch.manual_seed(0)
    net = slim(12, 20, 2, bidirectional=True)
    net.set_width(13)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x in (torch.randn(1, 1, 12), torch.randn(3, 20, 12)):
        for _ in range(3):
            trained = net(x)[0]
            for mode in (torch.no_grad, torch.inference_mode):
                for _ in range(2):
                    with mode():
                        assert error(net(x)[0], trained) < 1e-6
            trained.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def test_autocast_reads_the_present_weights():
    net, x = SlimLSTM(12, 20), torch.randn(1, 1, 12)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x)[0]
        assert found.dtype == torch.bfloat16
        assert error(found, net(x)[0]) < 2e-2
        net.weight_hh_l0.mul_(0.5)
        net.bias_ih_l0.add_(1.0)


@pytest.mark.skipif(not torch._C._dispatch_has_kernel_for_dispatch_key("slimkernels::slim_gru", "CPU"), reason="no C++")
def test_the_op_guards_memory_after_weights_are_kept():
    weights = test_slim_lstm.make_weights(16, 12)
    op, x = torch.ops.slimkernels.slim_lstm_inference, torch.randn(1, 1, 12)
    op(x, None, None, weights, None, 1, False, 16, 0, 1)
    for arguments, words in (
        ((x, None, None, weights, None, 1, False, 16, 16, 1), "proj_size"),
        ((x.bfloat16(), None, None, weights, None, 1, False, 16, 0, 1), "dtype"),
        ((x, None, None, weights, None, 1, False, 17, 0, 1), "hidden_size"),
        ((x, torch.randn(1, 1, 15), None, weights, None, 1, False, 16, 0, 1), "h0"),
        ((x, None, torch.randn(1, 2, 16), weights, None, 1, False, 16, 0, 1), "c0"),
        ((torch.randn(1, 1, 13), None, None, weights, None, 1, False, 16, 0, 1), "x.shape"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            op(*arguments)
