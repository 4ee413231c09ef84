"""Slimmable multi-head attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from slimkernels.nn._base import SlimModule
from slimkernels.nn.linear import SlimLinear
from slimkernels.ops.slim_linear import slim_linear


def first_heads(mask: Tensor, query: Tensor, batch_first: bool, full: int, heads: int) -> Tensor:
    """Of a mask for each of ``full`` heads, as a network that writes their number makes at every width, the first heads'."""
    batch = query.shape[0 if batch_first else 1] if query.dim() == 3 else 1
    if heads == full or mask.dim() != 3 or mask.shape[0] != batch * full:
        return mask
    return mask.unflatten(0, (batch, full))[:, :heads].flatten(0, 1)


class _Attention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose sizes are those of its weights, not all the one ``embed_dim``.

    It never runs torch's inference path, nor do torch's transformer layers around it: that reads the weights past the
    modules.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # torch.nn.TransformerEncoderLayer asks this before it takes its inference path. While nn.MultiheadAttention is
        # being made the answer is what it put there.
        return self.__dict__["_qkv_same_embed_dim"] and "out_proj" not in self._modules

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def _channels(self) -> int:
        """Channels of the heads that run."""
        return self.num_heads * self.head_dim

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
        """``parts`` of q, k and v, one after the other in the last dimension."""
        return F.linear(x, weight, bias)

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            given = zip((query, key, value), weights, biases, strict=True)
            return tuple(self._project(x, w, b, 1) for x, w, b in given)
        if query is key and key is value:
            return self._project(query, weight, bias, 3).chunk(3, -1)
        rows = weight.shape[0] // 3
        w_q, w_kv = weight[:rows], weight[rows:]
        b_q, b_kv = (None, None) if bias is None else (bias[:rows], bias[rows:])
        q = self._project(query, w_q, b_q, 1)
        if key is value:
            return (q, *self._project(key, w_kv, b_kv, 2).chunk(2, -1))
        b_k, b_v = (None, None) if b_kv is None else b_kv.chunk(2)
        return q, self._project(key, w_kv[:rows], b_k, 1), self._project(value, w_kv[rows:], b_v, 1)

    def forward(
        self,
        query: Tensor,  # (steps, batch, e), (batch, steps, e) with batch_first, or (steps, e)
        key: Tensor,  # (keys, batch, k), (batch, keys, k) with batch_first, or (keys, k)
        value: Tensor,  # (keys, batch, v), (batch, keys, v) with batch_first, or (keys, v)
        key_padding_mask: Tensor | None = None,  # (batch, keys) or (keys,), True or a number to add
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (steps, keys) or (batch * heads, steps, keys), True or a number to add
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # like query; (batch, steps, keys), or with heads before the steps
        self._check(query, key, value)
        batched = query.dim() == 3
        batch_first = self.batch_first and batched
        channels = self._channels()
        heads = channels // self.head_dim
        if attn_mask is not None:
            attn_mask = first_heads(attn_mask, query, self.batch_first, self.num_heads, heads)
        q, k, v = self._in_projection(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (t.unflatten(-1, (heads, self.head_dim)).permute(order) for t in (q, k, v))
        if attn_mask is None and is_causal:
            raise ValueError(f"{type(self).__name__}: expected attn_mask with is_causal=True, got none")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._mask(None if is_causal else attn_mask, key_padding_mask, q, k)
        if self.bias_k is not None and self.bias_v is not None:
            shape = (q.shape[0], heads, 1, self.head_dim)
            k, v = (
                torch.cat([t, bias[..., :channels].view(1, heads, 1, self.head_dim).expand(shape).to(t.dtype)], 2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None and mask.shape[-1] < k.shape[-2]:
            mask = F.pad(mask, (0, k.shape[-2] - mask.shape[-1]))  # the keys added are never left out
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = torch.matmul(q * math.sqrt(1.0 / self.head_dim), k.transpose(-2, -1))
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            y = torch.matmul(weights, v)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self.out_proj(y.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2))
        if not batched:
            return y.squeeze(1), None if weights is None else weights.squeeze(0)
        return y, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = type(self).__name__
        if query.is_nested or key.is_nested:
            raise ValueError(f"{name}: expected padded tensors with a key_padding_mask, got a nested tensor")
        if query.dim() not in (2, 3):
            raise ValueError(f"{name}: expected query to have 2 or 3 dimensions, got shape {tuple(query.shape)}")
        if key.dim() != query.dim() or value.dim() != query.dim() or key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{name}: expected key and value of the same steps with {query.dim()} dimensions like query, got shapes"
                f" {tuple(key.shape)} and {tuple(value.shape)}"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[batch] != query.shape[batch]:
            raise ValueError(f"{name}: expected key of batch {query.shape[batch]} like query, got {key.shape[batch]}")
        if self.in_proj_weight is not None and not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            sizes = ", ".join(str(t.shape[-1]) for t in (query, key, value))
            raise ValueError(f"{name}: expected query, key and value of one number of features, got {sizes}")

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores, to be broadcast to (batch, heads, steps, keys)."""
        batch, heads, steps, keys = *q.shape[:3], k.shape[2]
        found: Tensor | None = None
        if attn_mask is not None:
            shape = (steps, keys) if attn_mask.dim() == 2 else (batch * heads, steps, keys)
            found = self._additive("attn_mask", attn_mask, shape, q.dtype)
            found = found.expand(1, 1, steps, keys) if attn_mask.dim() == 2 else found.view(batch, heads, steps, keys)
        if padding is not None:
            padding = self._additive("key_padding_mask", padding, (batch, keys), q.dtype)[:, None, None]
            found = padding if found is None else found + padding
        return found

    def _additive(self, name: str, mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if tuple(mask.shape) != shape:
            raise ValueError(f"{type(self).__name__}: expected {name} of shape {shape}, got {tuple(mask.shape)}")
        if mask.dtype == torch.bool:
            return torch.zeros(shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
        if not mask.is_floating_point():
            raise TypeError(f"{type(self).__name__}: expected {name} of bool or floating point, got {mask.dtype}")
        return mask.to(dtype)


class AnySizeMultiheadAttention(_Attention):
    """``nn.MultiheadAttention`` with any number of heads of any size, in operations of torch.

    What ``elastic.extract`` gives where a width leaves ``num_heads * head_dim`` channels in the heads beside another number
    of features around them: ``nn.MultiheadAttention`` cannot have that. Same state_dict keys; the forward takes and gives
    the same, and its errors and dtypes are those of ``SlimMultiheadAttention``.

    Args:
        embed_dim: features of the query.
        head_dim: channels of a head, by default ``embed_dim // num_heads``.
        out_dim: features put out, by default ``embed_dim``.
        kdim, vdim: features of keys and values, by default ``embed_dim``.

    Raises: ValueError when a size is not positive.
    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762), section 3.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        head_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        kdim, vdim, out_dim = (embed_dim if n is None else n for n in (kdim, vdim, out_dim))
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "head_dim": head_dim, "out_dim": out_dim}
        for name, size in (sizes | {"kdim": kdim, "vdim": vdim}).items():
            if size < 1:
                raise ValueError(f"AnySizeMultiheadAttention: expected {name} of at least 1, got {size}")
        n = num_heads * head_dim
        options = {"device": device, "dtype": dtype}
        super().__init__(n, num_heads, dropout, bias, batch_first=batch_first, device="meta")
        self.add_zero_attn = add_zero_attn
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        shapes = {"q_proj_weight": (n, embed_dim), "k_proj_weight": (n, kdim), "v_proj_weight": (n, vdim)}
        self._qkv_same_embed_dim = kdim == embed_dim and vdim == embed_dim
        if kdim == embed_dim and vdim == embed_dim:
            shapes = {"in_proj_weight": (3 * n, embed_dim)}
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            made = nn.Parameter(torch.empty(shapes[name], **options)) if name in shapes else None
            self.register_parameter(name, made)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(3 * n, **options))
        if add_bias_kv:
            self.bias_k, self.bias_v = (nn.Parameter(torch.empty((1, 1, n), **options)) for _ in "kv")
        self.out_proj = NonDynamicallyQuantizableLinear(n, out_dim, bias, **options)
        self._reset_parameters()

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class SlimMultiheadAttention(SlimModule, _Attention):
    """``nn.MultiheadAttention`` that runs on its first heads (``set_width``) and as many features as it is given.

    Same constructor, state_dict keys, initialisation, arguments and results as ``nn.MultiheadAttention``; at full width
    equal to it. ``width`` counts the channels of the active heads, whole heads of ``head_dim`` channels each; attention
    weights, and masks for each head, are those of the active heads (of masks for all heads the first are taken). How many
    features it puts out is the width of its ``out_proj``, a ``SlimLinear``. A self-attention multiplies by the packed weight
    in place, as three blocks of rows (see ``slimkernels.ops.slim_linear``); q, k and v of other tensors use views of it.

    Dtypes: query, key, value and the weights have one, float32, float64, bfloat16 or float16, or autocast's.
    Raises: ValueError when a width is no number of whole heads, a shape does not fit or ``is_causal`` has no mask;
        TypeError when dtypes differ, or a mask is of whole numbers.
    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762), section 3.2; slices: Yu et al. (arXiv 1812.08928).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        out = SlimLinear(embed_dim, embed_dim, bias, device="meta")
        out.weight, out.bias = self.out_proj.weight, self.out_proj.bias
        self.out_proj = out  # type: ignore[assignment]
        self._init_slim()

    def _init_slim(self) -> None:
        """What a layer of torch that becomes this one lacks."""
        self._init_width(self.num_heads * self.head_dim)

    @property
    def heads(self) -> int:
        """Active heads."""
        return self.width // self.head_dim

    def _check_width(self, n: int) -> None:
        super()._check_width(n)
        if n % self.head_dim:
            raise ValueError(
                f"{type(self).__name__}: expected a width of whole heads, a multiple of head_dim={self.head_dim}, got {n}"
            )

    def _channels(self) -> int:
        return self.width

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
        if self.in_index is not None:
            weight = weight.index_select(1, self.in_index)
        return slim_linear(x, weight, bias, parts * self.width, out_blocks=parts)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, width={self.width}"
