"""``slim_lstm`` and ``slim_gru`` with enough rows for the matrix products: odd widths, blocks and projections of odd parts."""

import pytest
import torch

from slimkernels.ops import slim_lstm
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id
from tests.ops import test_slim_gru, test_slim_lstm

PROJECTED = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
KINDS = {"lstm": test_slim_lstm, "gru": test_slim_gru}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("steps", "batch"), [(9, 5), (3, 19), (41, 7)], ids=["chunks", "joined", "several-chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_widths_of_many_rows(kind, steps, batch, dtype):
    of = KINDS[kind]
    args, kwargs = of.sample(steps, batch, 15, 33, 18, 40, layers=2, directions=2)
    check_as_good_as_pytorch(of.ours, of.oracle, args, kwargs | {"in_blocks": 3}, dtype)


@PROJECTED
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("steps", "batch"), [(9, 5), (3, 19), (41, 7), (3, 2)])
@pytest.mark.parametrize(("h", "proj"), [(33, 7), (70, 69), (2, 1)])
def test_projection_of_many_rows(h, proj, steps, batch, dtype):
    args, kwargs = test_slim_lstm.sample(
        steps, batch, 15, h, 18, 72, layers=2, directions=2, proj=proj, full_proj=proj + 2
    )
    check_as_good_as_pytorch(test_slim_lstm.ours, test_slim_lstm.oracle, args, kwargs | {"in_blocks": 3}, dtype)


@PROJECTED
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sizes", [[19, 19, 17, 5, 3], [4, 3, 1], [6, 6, 6, 6, 5, 1, 1]])
@pytest.mark.parametrize(("kind", "proj"), [("lstm", 0), ("lstm", 7), ("gru", 0)])
def test_packed_rows(kind, proj, sizes, dtype):
    of, extra = KINDS[kind], {"proj": proj, "full_proj": proj and proj + 2} if kind == "lstm" else {}
    (_, weights, h, *states), kwargs = of.sample(1, sizes[0], 9, 33, 12, 36, layers=2, directions=2, **extra)
    args = (torch.randn(sum(sizes), 9), weights, h, *states)
    check_as_good_as_pytorch(of.ours, of.oracle, args, kwargs | {"sizes": torch.tensor(sizes, device="cpu")}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_projection_streaming_equals_batch_processing(dtype):
    weights = [w.to(dtype) for w in test_slim_lstm.make_weights(40, 20, layers=2, full_proj=12)]
    x, options = torch.randn(12, 3, 17).to(dtype), {"num_layers": 2, "proj_size": 11}
    with torch.inference_mode():
        y, (h_n, c_n) = slim_lstm(x, weights, 35, **options)
        state, steps = None, []
        for t in range(12):
            step, state = slim_lstm(x[t : t + 1], weights, 35, state, **options)
            steps.append(step)
    limit = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for found, expected in [(torch.cat(steps), y), (state[0], h_n), (state[1], c_n)]:
        assert (found.double() - expected.double()).norm() <= limit * expected.double().norm()


def test_projection_gradients_stay_in_the_slice():
    weights = [w.requires_grad_() for w in test_slim_lstm.make_weights(12, 8, full_proj=6)]
    y, _ = slim_lstm(torch.randn(9, 4, 7), weights, 9, proj_size=5)
    dw_ih, dw_hh, _, _, dw_hr = torch.autograd.grad(y.square().sum(), weights)
    assert dw_ih.unflatten(0, (4, 12))[:, 9:].abs().sum() == dw_ih[:, 7:].abs().sum() == 0
    assert dw_hh.unflatten(0, (4, 12))[:, 9:].abs().sum() == dw_hh[:, 5:].abs().sum() == 0
    assert dw_hr[5:].abs().sum() == dw_hr[:, 9:].abs().sum() == 0
    assert dw_hr[:5, :9].abs().min() > 0
