import pytest
import torch
from torch import nn

import slimkernels.nn
from slimkernels.nn import SlimGroupNorm, SlimLayerNorm, SlimRMSNorm
from tests.helpers import check_graphs

NORMS = [
    (SlimLayerNorm, nn.LayerNorm, (16,), (3, 5, 16), -1),
    (SlimRMSNorm, nn.RMSNorm, (16,), (3, 5, 16), -1),
    (SlimGroupNorm, nn.GroupNorm, (4, 16), (3, 16, 5, 2), 1),
]


def of_width(plain, arguments, n):
    return plain(*(max(n // 4, 1), n) if len(arguments) == 2 else (n,))


@pytest.mark.parametrize(
    ("slim", "plain", "arguments", "shape", "dim"), NORMS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("n", [16, 12, 4, 3])
def test_norm_at_a_width_is_the_plain_norm_of_that_width(n, slim, plain, arguments, shape, dim):
    ours, theirs = slim(*arguments), of_width(plain, arguments, n)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    assert list(ours.state_dict()) == list(plain(*arguments).state_dict())
    theirs.load_state_dict({key: value[:n] for key, value in ours.state_dict().items()})
    ours.set_width(n)
    assert ours.width == n
    x = torch.randn(shape).narrow(dim, 0, n)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    dy = torch.randn(x.shape)
    for norm, own in zip((ours, theirs), xs, strict=True):
        norm(own).backward(dy)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-5)
    for name, parameter in theirs.named_parameters():
        grad = getattr(ours, name).grad
        torch.testing.assert_close(grad[:n], parameter.grad, rtol=1e-4, atol=1e-5)
        assert torch.equal(grad[n:], torch.zeros(16 - n))


@pytest.mark.parametrize(
    ("slim", "plain", "arguments", "shape", "dim"), NORMS, ids=lambda v: getattr(v, "__name__", "")
)
def test_norm_activation_residual_and_in_index(slim, plain, arguments, shape, dim):
    norm, index = slim(*arguments, activation="relu"), torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    other = of_width(plain, arguments, 8)
    other.load_state_dict({key: value[index] for key, value in norm.state_dict().items()})
    x, residual = torch.randn(2, *shape).index_select(dim % len(shape) + 1, index)
    norm.in_index = index
    torch.testing.assert_close(norm(x, residual), torch.relu(other(x) + residual))


@pytest.mark.parametrize(
    ("slim", "plain", "arguments", "shape", "dim"), NORMS, ids=lambda v: getattr(v, "__name__", "")
)
def test_norm_compiles_to_few_graphs(slim, plain, arguments, shape, dim):
    norm = slim(*arguments)
    inputs = [(torch.randn(shape).narrow(dim, 0, n).requires_grad_(),) for n in range(4, 16)]
    check_graphs(lambda x: norm(x), inputs)


@pytest.mark.parametrize("slim", [SlimLayerNorm, SlimRMSNorm])
def test_norm_over_several_dimensions_is_refused(slim):
    with pytest.raises(ValueError, match=r"expected normalized_shape of one dimension, got \(4, 5\)"):
        slim((4, 5))


@pytest.mark.parametrize("affine", [True, False])
def test_norm_without_affine(affine):
    x = torch.randn(3, 8, 2)
    torch.testing.assert_close(SlimGroupNorm(4, 16, affine=False)(x), nn.functional.group_norm(x, 2))
    norm = SlimLayerNorm(16, elementwise_affine=affine, bias=False)
    torch.testing.assert_close(norm(x.transpose(1, 2)), nn.functional.layer_norm(x.transpose(1, 2), (8,)))


@pytest.mark.parametrize(("d", "affine"), [(1, True), (2, False), (3, True)])
def test_instance_norm_on_its_first_channels(d, affine):
    torch.manual_seed(0)
    ours = getattr(slimkernels.nn, f"SlimInstanceNorm{d}d")(8, affine=affine)
    plain = getattr(nn, f"InstanceNorm{d}d")(5, affine=affine)
    if affine:
        with torch.no_grad():
            for name, p in plain.named_parameters():
                getattr(ours, name).normal_()
                p.copy_(getattr(ours, name)[:5])
    x = torch.randn(2, 5, *[6] * d)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours(x[0]), plain(x[0]))
    with pytest.raises(ValueError, match="expected x with at most 8 channels, got 9"):
        ours(torch.randn(2, 9, *[6] * d))
    with pytest.raises(ValueError, match="expected track_running_stats to be False"):
        type(ours)(8, track_running_stats=True)
