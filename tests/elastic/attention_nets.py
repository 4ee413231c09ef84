"""Networks with ``nn.MultiheadAttention``, each as small as it can be."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.elastic.handwritten_forwards import Net

D, H, M = 32, 4, 48  # features, heads, hidden units
STEPS = (2, 7, 5)
IMAGE = (2, 3, 16, 16)


class ViTBlock(nn.Module):
    def __init__(self, d: int, h: int, m: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, h, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, m), nn.GELU(), nn.Linear(m, d))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, class token, positions and blocks, as image classifiers have them; the size is written into the forward."""

    def __init__(self, d: int = D, h: int = H, m: int = M, blocks: int = 2) -> None:
        super().__init__()
        self.hidden_dim = d
        self.patches = nn.Conv2d(3, d, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 17, d))
        self.blocks = nn.Sequential(*(ViTBlock(d, h, m) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(x.shape[0], self.hidden_dim, -1).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Transformer(nn.Module):
    """Encoder and decoder layers of torch."""

    def __init__(self, d: int = D, h: int = H, m: int = M, **options: Any) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True} | options
        nested = options["batch_first"] and not options.get("norm_first") and options.get("bias", True) and h % 2 == 0
        self.embed = nn.Linear(5, d)
        layer = nn.TransformerEncoderLayer(d, h, m, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=bool(nested))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(d, h, m, **options), 2)
        self.out = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        padding = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) >= x.shape[1] - 2
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        if not self.encoder.layers[0].self_attn.batch_first:
            x = x.transpose(0, 1)
        memory = self.encoder(x, src_key_padding_mask=padding)
        return self.out(self.decoder(x, memory, tgt_mask=causal, memory_key_padding_mask=padding))


def whole(net: Any, x: Tensor) -> Tensor:
    """``nn.Transformer`` checks the number of features."""
    return net.out(net.transformer(net.a(x), net.b(x)))


def attend(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.out(x + net.attention(x, x, x, need_weights=False)[0])


def cross(net: Any, x: Tensor) -> Tensor:
    """Keys and values are other features than the queries."""
    q = net.a(x)
    return net.out(q + net.attention(q, F.relu(net.keys(x)), F.relu(net.values(x)), need_weights=False)[0])


def averaged(net: Any, x: Tensor) -> Tensor:
    """The averaged attention weights are used again."""
    x = net.a(x)
    y, weights = net.attention(x, x, x)
    return net.out(torch.bmm(weights, x) + y)


def masks_of_heads(net: Any, x: Tensor) -> Tensor:
    """Masks written for all heads."""
    steps = x.shape[1]
    mask = torch.ones(steps, steps, dtype=torch.bool).triu(1).repeat(x.shape[0] * H, 1, 1)
    x = net.a(x)
    return net.out(x + net.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


def steps_first(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).transpose(0, 1)
    return net.out(net.attention(query=x, key=x, value=x, need_weights=False)[0].transpose(0, 1))


def joined(net: Any, x: Tensor) -> Tensor:
    """The attention works on the features of two layers, side by side."""
    x = torch.cat([net.a(x), net.b(x)], -1)
    return net.out(net.attention(x, x, x, need_weights=False)[0])


def one(forward: Any, heads: int = H, **options: Any) -> Net:
    attention = nn.MultiheadAttention(D, heads, **{"batch_first": True} | options)
    return Net(forward, a=nn.Linear(5, D), attention=attention, out=nn.Linear(D, 3))


# Name -> (network, input shape, its width dimensions).
LAYERS = {
    f"{kind}.layers.{i}.{part}" for kind in ("encoder", "decoder") for i in (0, 1) for part in ("self_attn", "linear1")
}
LAYERS |= {"embed", *(f"decoder.layers.{i}.multihead_attn" for i in (0, 1))}
BLOCKS = {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp.0")}
OURS = {"a", "attention"}
NETS: dict[str, tuple[Any, tuple[int, ...], set[str]]] = {
    "vit": (ViT, IMAGE, {"patches", *BLOCKS}),
    "post-norm": (Transformer, STEPS, LAYERS),
    "pre-norm": (lambda: Transformer(norm_first=True), STEPS, LAYERS),
    "no-bias": (lambda: Transformer(bias=False, activation="gelu"), STEPS, LAYERS),
    "transformer": (
        lambda: Net(
            whole,
            a=nn.Linear(5, D),
            b=nn.Linear(5, D),
            transformer=nn.Transformer(D, H, 1, 1, M, batch_first=True),
            out=nn.Linear(D, 3),
        ),
        STEPS,
        {
            "a",
            *(
                f"transformer.{kind}.layers.0.{part}"
                for kind in ("encoder", "decoder")
                for part in ("self_attn", "linear1")
            ),
            "transformer.decoder.layers.0.multihead_attn",
        },
    ),
    "self": (lambda: one(attend), STEPS, OURS),
    "steps-first": (lambda: one(steps_first, batch_first=False), STEPS, OURS | {"attention.out_proj"}),
    "bias-kv": (lambda: one(attend, add_bias_kv=True), STEPS, OURS),
    "zero-attn": (lambda: one(attend, add_zero_attn=True, bias=False), STEPS, OURS),
    "kdim-vdim": (
        lambda: Net(
            cross,
            a=nn.Linear(5, D),
            keys=nn.Linear(5, 20),
            values=nn.Linear(5, 12),
            attention=nn.MultiheadAttention(D, H, kdim=20, vdim=12, batch_first=True),
            out=nn.Linear(D, 3),
        ),
        STEPS,
        OURS | {"keys", "values"},
    ),
    "averaged": (lambda: one(averaged), STEPS, OURS),
    "masks-of-heads": (lambda: one(masks_of_heads), STEPS, OURS),
    "joined": (
        lambda: Net(
            joined,
            a=nn.Linear(5, 16),
            b=nn.Linear(5, 16),
            attention=nn.MultiheadAttention(D, H, batch_first=True),
            out=nn.Linear(D, 3),
        ),
        STEPS,
        {"a", "b", "attention", "attention.out_proj"},
    ),
}
