import pytest
import torch
from torch import nn

from slimkernels.nn import SlimLinear
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id


def pair(bias=True, **options):
    plain, slim = nn.Linear(24, 18, bias=bias), SlimLinear(24, 18, bias=bias, **options)
    slim.load_state_dict(plain.state_dict(), strict=True)
    return plain, slim


def compare(slim, plain, x, dtype, **kwargs):
    """Outputs and all gradients of two modules whose parameters have the same shapes."""

    def through(module):
        def call(x, *parameters, **kwargs):
            names = [name for name, _ in module.named_parameters()]
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,), kwargs)

        return call

    check_as_good_as_pytorch(through(slim), through(plain), (x, *plain.parameters()), kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_at_full_width_is_torchs(bias, dtype):
    plain, slim = pair(bias)
    assert slim.state_dict().keys() == plain.state_dict().keys()
    compare(slim, plain, torch.randn(5, 7, 24), dtype)


@pytest.mark.parametrize(("width", "active"), [(1, 1), (7, 13), (18, 8), (17, 24)])
def test_linear_at_a_width_is_the_plain_layer_of_that_size(width, active):
    plain, slim = pair()
    cut = nn.Linear(active, width)
    cut.load_state_dict({"weight": plain.weight[:width, :active], "bias": plain.bias[:width]})
    slim.set_width(width)
    x = torch.randn(6, active)
    for module in (cut, slim):
        module(x).square().sum().backward()
    torch.testing.assert_close(slim(x), cut(x))
    torch.testing.assert_close(slim.weight.grad[:width, :active], cut.weight.grad)
    torch.testing.assert_close(slim.bias.grad[:width], cut.bias.grad)
    assert (
        slim.weight.grad[width:].abs().sum() == slim.weight.grad[:, active:].abs().sum() == slim.bias.grad[width:].sum()
    )


def test_linear_activation_and_residual():
    plain, slim = pair(activation="gelu")
    x, residual = torch.randn(6, 24), torch.randn(6, 18)
    torch.testing.assert_close(slim(x, residual), nn.functional.gelu(plain(x) + residual))


def test_linear_blocks():
    plain, slim = pair(in_blocks=2, out_blocks=3)
    slim.set_width(6)
    rows, cols = torch.tensor([0, 1, 6, 7, 12, 13]), torch.tensor([0, 1, 2, 3, 4, 12, 13, 14, 15, 16])
    x = torch.randn(4, 10)
    expected = nn.functional.linear(x, plain.weight[rows][:, cols], plain.bias[rows])
    torch.testing.assert_close(slim(x), expected)


def test_linear_gathers_the_inputs_that_in_index_lists():
    plain, slim = pair()
    slim.set_width(5)
    slim.in_index = torch.tensor([0, 1, 2, 10, 11])
    x = torch.randn(4, 5, requires_grad=True)
    expected = nn.functional.linear(x, plain.weight[:5, slim.in_index], plain.bias[:5])
    torch.testing.assert_close(slim(x), expected)
    slim(x).sum().backward()
    outside = [i for i in range(24) if i not in slim.in_index.tolist()]
    assert slim.weight.grad[:, outside].abs().sum() == 0
    assert (slim.weight.grad[:5, slim.in_index] != 0).all()
    with pytest.raises(ValueError, match=r"slim_linear: expected x.shape\[-1\] between 1 and 5, got 6"):
        slim(torch.randn(4, 6))


def test_linear_width_is_checked_and_shown():
    slim = SlimLinear(24, 18, out_blocks=3)
    slim.set_width(6)
    assert repr(slim) == "SlimLinear(in_features=24, out_features=18, bias=True, width=6)"
    slim.set_width(None)
    assert slim.width == slim.full_width == 18
    for width in (0, 19, 2.5):
        with pytest.raises(ValueError, match=f"SlimLinear: expected a width between 1 and 18, got {width}"):
            slim.set_width(width)
    with pytest.raises(ValueError, match="SlimLinear: expected width to be a multiple of out_blocks=3, got 7"):
        slim.set_width(7)
    with pytest.raises(ValueError, match="SlimLinear: expected in_blocks to divide the full size 24, got 5"):
        SlimLinear(24, 18, in_blocks=5)


def test_linear_rejects_another_size():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        SlimLinear(24, 18).load_state_dict(nn.Linear(24, 17).state_dict())
    with pytest.raises(ValueError, match=r"slim_linear: expected x.shape\[-1\] between 1 and 24, got 25"):
        SlimLinear(24, 18)(torch.randn(3, 25))
