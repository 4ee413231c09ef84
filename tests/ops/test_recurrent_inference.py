"""``slim_lstm`` and ``slim_gru`` where no gradient is needed: all layers are one op, with the results of the layers in turn."""

import pytest
import torch

from slimkernels.ops import slim_gru, slim_lstm
from tests.helpers import DTYPES, check_graphs, dtype_id, error
from tests.ops import test_slim_gru, test_slim_lstm

OPS = torch.ops.slimkernels
KINDS = {"lstm": (slim_lstm, test_slim_lstm.make_weights), "gru": (slim_gru, test_slim_gru.make_weights)}


FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}


def states(kind, count, batch, h, p=None):
    h0 = torch.randn(count, batch, p or h)
    return (h0, torch.randn(count, batch, h)) if kind == "lstm" else h0


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in tensors(part)]


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) else type(value)(cast(part, dtype) for part in value)


def op_arguments(kind, state):
    return state if kind == "lstm" else (state,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 3), (6, 2), (4, 17)])
def test_inference_gives_the_same_numbers(kind, dtype, directions, steps, batch):
    fn, make = KINDS[kind]
    for layers in (1, 2, 3):
        weights = cast(make(16, 12, layers=layers, directions=directions), dtype)
        x, state = cast([torch.randn(steps, batch, 10), states(kind, layers * directions, batch, 13)], dtype)
        options = {"num_layers": layers, "bidirectional": directions == 2}
        for start in (state, None):
            with torch.inference_mode():
                found = fn(x, weights, 13, start, **options)
            expected = fn(x.clone().requires_grad_(), weights, 13, start, **options)
            for a, b in zip(tensors(found), tensors(expected), strict=True):
                # Few rows are run on packed weights, by other kernels.
                assert error(a, b) < FLOOR[dtype] if steps * batch < 24 else torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_of_packed_rows_and_input_blocks(kind):
    fn, make = KINDS[kind]
    weights, sizes = make(16, 12, layers=2, directions=2), torch.tensor([4, 4, 3, 1], device="cpu")
    x = torch.randn(12, 10)
    options = {"num_layers": 2, "bidirectional": True, "batch_sizes": sizes, "in_blocks": 2}
    with torch.no_grad():
        found = fn(x, weights, 13, **options)
    expected = fn(x.clone().requires_grad_(), weights, 13, **options)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert error(a, b) < 1e-6


def test_inference_with_a_projection():
    weights = test_slim_lstm.make_weights(16, 12, layers=2, full_proj=9)
    x, state = torch.randn(5, 3, 10), states("lstm", 2, 3, 13, 7)
    with torch.inference_mode():
        found = slim_lstm(x, weights, 13, state, num_layers=2, proj_size=7)
    expected = slim_lstm(x.clone().requires_grad_(), weights, 13, state, num_layers=2, proj_size=7)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_inference_does_not_draw_dropout(kind):
    fn, make = KINDS[kind]
    weights, x = make(16, 12, layers=2), torch.randn(5, 3, 10)
    with torch.no_grad():
        assert not torch.equal(fn(x, weights, num_layers=2, dropout=0.5)[0], fn(x, weights, num_layers=2)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
def test_inference_opcheck(kind, directions):
    weights = KINDS[kind][1](8, 6, layers=2, directions=directions)
    start = op_arguments(kind, states(kind, 2 * directions, 2, 7))
    sizes = (2, directions == 2, 7, 0, 1) if kind == "lstm" else (2, directions == 2, 7, 1)
    op = getattr(OPS, f"slim_{kind}_inference").default
    torch.library.opcheck(op, (torch.randn(3, 2, 5), *start, weights, None, *sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_compiles_to_few_graphs(kind):
    fn, make = KINDS[kind]
    weights = make(64, 48, layers=2, directions=2)

    gain = torch.ones((), requires_grad=True)  # what check_graphs takes gradients of

    def call(x, h, gain):
        with torch.no_grad():
            y = fn(x, weights, h, num_layers=2, bidirectional=True)[0]
        return y * gain

    check_graphs(call, [(torch.randn(3, 2, h), h + 3, gain) for h in range(4, 40, 3)])


@pytest.mark.skipif(not torch._C._dispatch_has_kernel_for_dispatch_key("slimkernels::slim_gru", "CPU"), reason="no C++")
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_guards_memory_by_itself(kind):
    with torch.device("cpu"):
        refuses_what_does_not_fit(kind)


def refuses_what_does_not_fit(kind):
    weights = KINDS[kind][1](8, 6, layers=2)
    start = op_arguments(kind, states(kind, 2, 2, 7))
    op, x = getattr(OPS, f"slim_{kind}_inference").default, torch.randn(3, 2, 5)

    def sizes(layers, h):
        return (layers, False, h, 0, 1) if kind == "lstm" else (layers, False, h, 1)

    with pytest.raises(ValueError, match="expected h0 of shape"):
        op(x, *(s[:1] for s in start), weights, None, *sizes(2, 7))
    with pytest.raises(ValueError, match="expected hidden_size between 1 and 8, got 9"):
        op(x, *start, weights, None, *sizes(2, 9))
    with pytest.raises(ValueError, match="expected w_hh with"):
        op(x, *start, [*weights[:5], weights[5][:3], *weights[6:]], None, *sizes(2, 7))
