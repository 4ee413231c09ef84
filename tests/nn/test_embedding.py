import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimkernels.nn import SlimEmbedding
from tests.helpers import DEVICE, check_graphs

OPTIONS = [
    {},
    {"padding_idx": 2},
    {"scale_grad_by_freq": True},
    {"max_norm": 1.0},
    {"max_norm": 2.0, "norm_type": 1.0},
    {"sparse": True},
    {"sparse": True, "padding_idx": 2, "max_norm": 1.0},  # torch has no sparse gradient with scale_grad_by_freq
]
INDEX = torch.tensor([[0, 2, 5], [5, 1, 5]], device=DEVICE)


def pair(**options):
    plain, slim = nn.Embedding(7, 10, **options), SlimEmbedding(7, 10, **options)
    slim.load_state_dict(plain.state_dict(), strict=True)
    return plain, slim


@pytest.mark.parametrize("options", OPTIONS)
def test_embedding_at_full_width_is_torchs(options):
    plain, slim = pair(**options)
    dy = torch.randn(2, 3, 10)
    for module in (plain, slim):
        module(INDEX).backward(dy)
    assert torch.equal(plain(INDEX), slim(INDEX))
    assert torch.equal(plain.weight, slim.weight)
    assert slim.weight.grad.is_sparse == ("sparse" in options)
    assert torch.equal(plain.weight.grad.to_dense(), slim.weight.grad.to_dense())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("width", [1, 3, 9])
def test_embedding_at_a_width_is_that_of_the_cut_table(width, options):
    plain, slim = pair(**options)
    cut = nn.Embedding(7, width, **options)
    cut.load_state_dict({"weight": plain.weight[:, :width]})
    slim.set_width(width)
    dy = torch.randn(2, 3, width)
    for module in (cut, slim):
        module(INDEX).backward(dy)
    assert torch.equal(cut(INDEX), slim(INDEX))
    assert torch.equal(cut.weight, slim.weight[:, :width])
    assert torch.equal(plain.weight[:, width:], slim.weight[:, width:])
    grad = slim.weight.grad
    assert grad.is_sparse == ("sparse" in options)
    assert torch.equal(cut.weight.grad.to_dense(), grad.to_dense()[:, :width])
    assert grad.to_dense()[:, width:].abs().sum() == 0


def test_embedding_keys_and_constructor_are_torchs():
    plain, slim = pair(padding_idx=1)
    assert slim.state_dict().keys() == plain.state_dict().keys()
    assert slim.weight[1].abs().sum() == 0
    frozen = SlimEmbedding.from_pretrained(plain.weight.detach(), padding_idx=1)
    assert isinstance(frozen, SlimEmbedding)
    assert not frozen.weight.requires_grad
    assert frozen.width == 10
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        slim.load_state_dict({"weight": torch.randn(7, 9)})


def test_embedding_width_is_checked_and_shown():
    slim = SlimEmbedding(7, 10)
    slim.set_width(4)
    assert slim(torch.tensor(3)).shape == (4,)
    assert repr(slim) == "SlimEmbedding(7, 10, width=4)"
    slim.set_width(None)
    assert slim.width == 10
    for width in (0, 11, 2.5):
        with pytest.raises(ValueError, match=f"SlimEmbedding: expected a width between 1 and 10, got {width}"):
            slim.set_width(width)


def test_embedding_empty_batch():
    slim = SlimEmbedding(7, 10)
    slim.set_width(4)
    y = slim(torch.empty(0, 3, dtype=torch.int64))
    assert y.shape == (0, 3, 4)
    y.sum().backward()
    assert slim.weight.grad.abs().sum() == 0


def test_embedding_compiles_to_few_graphs():
    weight = torch.randn(7, 64, requires_grad=True)
    slim = SlimEmbedding(7, 64)
    slim.weight = nn.Parameter(weight.detach())

    def call(w, like):
        slim.set_width(like.shape[1])
        return slim(INDEX) + F.embedding(INDEX, w)[..., :1]

    check_graphs(call, [(weight, torch.empty(1, n)) for n in range(4, 40, 3)])
