"""The ops of single recurrent layers as they run on a GPU, in a compiled model: calls of cuDNN, forward and backward.

cuDNN's two functions are played by PyTorch's LSTM and GRU on the CPU. They take their arguments by the names of PyTorch's
schema, so that one in the wrong place is found.
"""

import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from slimkernels.ops import _recurrent_gpu, slim_gru, slim_lstm
from tests.emulation.launchers import registered

SCHEMAS = {name: getattr(torch.ops.aten, name).default._schema for name in ("_cudnn_rnn", "_cudnn_rnn_backward")}
CASES = {
    "lstm": (slim_lstm, 4, {}),
    "lstm, no bias": (slim_lstm, 4, {"bias": False}),
    "lstm, both ways": (slim_lstm, 4, {"directions": 2}),
    "lstm, two layers, both ways": (slim_lstm, 4, {"directions": 2, "layers": 2}),
    "lstm, projection": (slim_lstm, 4, {"proj": 6}),
    "lstm, in blocks": (slim_lstm, 4, {"in_blocks": 2}),
    "lstm, packed": (slim_lstm, 4, {"sizes": [3, 2, 2]}),
    "gru": (slim_gru, 3, {}),
    "gru, two layers, both ways": (slim_gru, 3, {"directions": 2, "layers": 2}),
    "gru, packed": (slim_gru, 3, {"sizes": [3, 2, 2]}),
}


def named(name, args):
    wanted = SCHEMAS[name].arguments
    assert len(args) == len(wanted)
    for value, argument in zip(args, wanted, strict=True):
        kind = str(argument.type)
        assert isinstance(value, torch.Tensor) == (kind == "Tensor") or kind.startswith("Optional"), argument.name
    return {argument.name: value for argument, value in zip(wanted, args, strict=True)}


def play(a, x, hx, cx, weight):
    """PyTorch's layer; ``a``: the arguments."""
    assert a["weight_stride0"] * (2 if a["bidirectional"] else 1) == len(weight)
    assert all(t.is_contiguous() for t in (x, hx, *weight))
    kind = {2: torch.lstm, 3: torch.gru}[a["mode"]]
    state = (hx, cx) if cx is not None else hx
    options = a["weight_stride0"] >= 4, a["num_layers"], a["dropout"], a["train"], a["bidirectional"]
    if a["batch_sizes"]:
        return kind(x, torch.tensor(a["batch_sizes"]), state, weight, *options)
    return kind(x, state, weight, *options, a["batch_first"])


def forward(*args):
    a = named("_cudnn_rnn", args)
    assert a["hidden_size"] == a["weight"][1].shape[0] // (4 if a["mode"] == 2 else 3)
    y, h, *c = play(a, a["input"], a["hx"], a["cx"], a["weight"])
    buffer = torch.cat([w.flatten() for w in a["weight"]])
    return y, h, c[0] if c else torch.empty(0), torch.empty(7, dtype=torch.uint8), buffer


def backward(*args):
    a = named("_cudnn_rnn_backward", args)
    assert a["train"]
    assert a["reserve"].dtype == torch.uint8
    with torch.enable_grad():
        leaves = [a["input"], a["hx"], *([a["cx"]] if a["cx"] is not None else []), *a["weight"]]
        leaves = [t.detach().requires_grad_() for t in leaves]
        first = 2 if a["cx"] is None else 3
        x, hx, *rest = leaves
        results = play(a, x, hx, rest[0] if first == 3 else None, leaves[first:])
        torch.testing.assert_close(results[0], a["output"])
        given = [a["grad_output"], a["grad_hy"], a["grad_cy"]]
        pairs = [(t, g) for t, g in zip(results, given, strict=False) if g is not None]
        found = torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    dx, dhx, *dcx = found[:first]
    outputs = [dx, dhx, dcx[0] if dcx else None, list(found[first:])]
    return tuple(g if wanted else None for g, wanted in zip(outputs, a["output_mask"], strict=True))


@pytest.fixture
def on_gpu(monkeypatch):
    """The ops with the kernels that CUDA tensors have, and their fakes."""
    monkeypatch.setattr(_recurrent_gpu, "FORWARD", forward)
    monkeypatch.setattr(_recurrent_gpu, "BACKWARD", backward)
    for op in ("slim_lstm", "slim_gru"):
        monkeypatch.setattr(sys.modules[f"slimkernels.ops.{op}"], "recomputes", lambda x: True)
    kernels = {
        "slim_lstm": _recurrent_gpu.lstm_layer,
        "slim_lstm_backward": _recurrent_gpu.lstm_layer_backward,
        "slim_gru": _recurrent_gpu.gru_layer,
        "slim_gru_backward": _recurrent_gpu.gru_layer_backward,
    }
    with registered(kernels):
        yield


def problem(gates, *, layers=1, directions=1, bias=True, proj=0, in_blocks=1, sizes=None):
    torch.manual_seed(0)
    full_h, full_i, weights = 10, 12, []
    state = proj or full_h
    for layer in range(layers):
        for _ in range(directions):
            columns = full_i if layer == 0 else directions * state
            shapes = [(gates * full_h, columns), (gates * full_h, state)]
            shapes += [(gates * full_h,)] * 2 if bias else []
            shapes += [(proj, full_h)] if proj else []
            weights += [torch.randn(s).mul(0.3).requires_grad_() for s in shapes]
    h, p = 7, 4 if proj else 0
    x = torch.randn(*((sum(sizes),) if sizes else (5, 3)), 8).requires_grad_()
    states = [torch.randn(layers * directions, 3, p or h).requires_grad_()]
    if gates == 4:
        states.append(torch.randn(layers * directions, 3, h).requires_grad_())
    options = {"num_layers": layers, "bidirectional": directions == 2, "in_blocks": in_blocks}
    options |= {"batch_sizes": torch.tensor(sizes)} if sizes else {}
    options |= {"proj_size": p} if proj else {}
    return x, weights, h, states, options


def run(op, x, weights, h, states, options):
    y, final = op(x, weights, h, tuple(states) if len(states) == 2 else states[0], **options)
    results = [y, *(final if isinstance(final, tuple) else [final])]
    leaves = [x, *states, *weights]
    grads = torch.autograd.grad([t.square().sum() for t in results], leaves)
    (later,) = torch.autograd.grad([t.sum() for t in op(x, weights, h, **options)[:1]], [weights[1]])
    return [*results, *grads, later]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", CASES)
def test_layers_by_cudnn_equal_the_ops(name, request):
    op, gates, options = CASES[name]
    given = problem(gates, **options)
    expected = run(op, *given)
    request.getfixturevalue("on_gpu")
    for ours, theirs in zip(run(op, *given), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_layer_is_one_op_each_way(on_gpu):
    x, weights, h, *_ = problem(4)
    called = []

    def keep(graph, inputs):
        called.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(lambda x: slim_lstm(x, weights, h)[0], backend=backend, fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, slim_lstm(x, weights, h)[0])
    assert [[name for name in graph if "slimkernels" in name] for graph in called] == [
        ["slimkernels.slim_lstm.default"],
        ["slimkernels.slim_lstm_backward.default"],
    ]
    assert not any(name in str(called) for name in ("addmm", "linear", "aten.mm", "_local_scalar"))


def test_nothing_is_kept_for_backward_on_a_gpu():
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(5, 3, 8, device="cuda")
        weights = [torch.empty(40, n, device="cuda") for n in (12, 10)]
        op = torch.ops.slimkernels.slim_lstm.default
        *_, gates, cells = op(x, None, None, weights, None, False, 7, 0, 1, True)
        assert gates.shape == cells.shape == (0,)
        weights = [torch.empty(30, n, device="cuda") for n in (12, 10)]
        assert torch.ops.slimkernels.slim_gru.default(x, None, weights, None, False, 7, 1, True)[-1].shape == (0,)
