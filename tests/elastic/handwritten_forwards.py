"""Forwards in the many styles that people write by hand, a few lines each: states, norms, attention, gates, views, loops."""

import math

import torch
import torch.nn.functional as F
from torch import nn

STEPS, IMAGE, ROWS, TOKENS = (3, 6, 5), (2, 3, 8, 8), (4, 6), (2, 7)


class Net(nn.Module):
    """A forward written as a function, and its modules, parameters and numbers."""

    def __init__(self, forward, **members):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def mlp(n, inner):
    return nn.Sequential(nn.Linear(n, inner), nn.ReLU(), nn.Linear(inner, n))


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


# States of recurrent layers.


def gru_zeros(net, x):
    return net.out(net.rnn(x, torch.zeros(2, x.shape[0], net.hidden, dtype=x.dtype))[0])


def lstm_new_zeros(net, x):
    h = x.new_zeros(2 * 2, x.shape[0], 12)
    y, (h, _) = net.rnn(x, (h, torch.zeros_like(h)))
    return net.out(torch.cat([y[:, -1], h[-2], h[-1]], -1))


def cell_zeros(net, x):
    h = c = torch.zeros(x.shape[0], net.hidden, dtype=x.dtype)
    for step in x.unbind(1):
        h, c = net.cell(step, (h, c))
    return net.out(h)


def keyword_state(net, x):
    return net.out(net.rnn(x, hx=torch.zeros(1, x.shape[0], net.rnn.hidden_size, dtype=x.dtype))[0])


def learned_state(net, x):
    return net.out(net.rnn(x, net.start.expand(-1, x.shape[0], -1).contiguous())[0])


def lstm_by_hand(start):
    def forward(net, x):
        h = c = start(net, x)
        for step in x.unbind(1):
            i, f, g, o = (net.of_x(step) + net.of_h(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return net.out(h)

    return Net(forward, of_x=nn.Linear(5, 48), of_h=nn.Linear(12, 48), out=nn.Linear(12, 3), start=nn.Linear(5, 12))


def outputs_of_given_size(net, x):
    found, h = torch.zeros(x.shape[0], x.shape[1], 12, dtype=x.dtype), None
    for i in range(x.shape[1]):
        h = net.cell(x[:, i], h)
        found[:, i] = h
    return net.out(found)


def conv_lstm(net, x):
    x = net.a(x)
    h = c = torch.zeros_like(x)
    for _ in range(2):
        i, f, o, g = net.gates(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return net.out(h)


# Norms.


class ChannelNorm(nn.Module):
    """The layer norm of channels-first images that ConvNeXt's code has."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.bias = parameter(n), parameter(n)

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class RootMeanSquare(nn.Module):
    """The RMS norm of language models."""

    def __init__(self, n):
        super().__init__()
        self.scale = parameter(n)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


def functional_norm(net, x):
    x = net.a(x)
    return net.out(F.relu(F.layer_norm(x, x.shape[-1:], net.gain, net.shift)))


def var_mean_norm(net, x):
    x = net.a(x)
    var, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return net.out((x - mean) / (var + 1e-5).sqrt())


def l2_normalised(net, x):
    return net.out(F.normalize(net.a(x), dim=-1))


# Attention.


def one_head(net, x):
    x = net.a(x)
    scores = net.q(x) @ net.k(x).transpose(1, 2) / math.sqrt(8)
    return net.out(x + net.back(scores.softmax(-1) @ net.v(x)))


def heads_of(split, attend=None):
    """q, k and v from layers of their own; ``split`` makes heads."""

    def forward(net, x):
        x = net.a(x)
        b, t, c = x.shape
        q, k, v = (split(layer(x), b, t, c).transpose(1, 2) for layer in (net.q, net.k, net.v))
        if attend is None:
            y = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        else:
            y = attend(q, k, v)
        return net.out(x + net.back(y.transpose(1, 2).reshape(b, t, -1)))

    layers = {name: nn.Linear(16, 16) for name in ("q", "k", "v", "back")}
    return Net(forward, a=nn.Linear(5, 16), out=nn.Linear(16, 3), **layers)


def packed(net, x):
    x = net.a(x)
    b, t, c = x.shape
    q, k, v = net.qkv(x).split(c, -1)
    q, k, v = (part.view(b, t, 4, c // 4).transpose(1, 2) for part in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(b, t, c)
    return net.out(x + net.back(y))


def multihead(net, x):
    x = net.a(x)
    return net.out(x + net.m(net.attention(x, x, x)[0]))


def non_local(net, x):
    x = net.a(x)
    q, k, v = (f(x).flatten(2) for f in (net.q, net.k, net.v))
    y = torch.einsum("bij,bcj->bci", torch.einsum("bci,bcj->bij", q, k).softmax(-1), v)
    return net.out(x + net.back(y.unflatten(2, x.shape[2:])))


# Gates and channels.


def squeeze_excite(net, x):
    x = net.a(x)
    s = net.fc2(F.relu(net.fc1(x.mean((2, 3))))).sigmoid()
    return net.out(x * s[:, :, None, None])


def efficient_channel_attention(net, x):  # a convolution over neighbouring channels
    x = net.a(x)
    s = net.over(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)
    return net.out(x * s[:, :, None, None])


def film(net, x):
    y = F.relu(net.a(x))
    scale, shift = net.condition(x.mean((2, 3))).chunk(2, 1)
    return net.out(y * (1 + scale[..., None, None]) + shift[..., None, None])


def highway(net, x):
    x = net.a(x)
    gate = net.gate(x).sigmoid()
    return net.out(gate * F.relu(net.b(x)) + (1 - gate) * x)


def channel_softmax(net, x):
    x = net.a(x)
    return net.out(x * net.gate(x).softmax(-1))


def shuffle(net, x):
    x = F.relu(net.a(x))
    b, c, h, w = x.shape
    return net.out(net.b(x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)))


def negated_too(net, x):
    x = net.a(x)
    return net.out(F.relu(torch.cat([x, -x], 1)))


def maxout(net, x):
    return net.out(net.a(x).view(x.shape[0], -1, 2).amax(-1))


def halves_added(net, x):
    x = net.a(x)
    return net.out(x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :])


def dense(net, x):
    found = [net.a(x)]
    for layer in net.layers:
        found.append(F.relu(layer(torch.cat(found, 1))))
    return net.out(torch.cat(found, 1))


def up_and_down(net, x):
    x = F.relu(net.a(x))
    y = F.interpolate(F.relu(net.down(x)), scale_factor=2)
    return net.out(torch.cat([x, y], 1))


def flattened(size):
    def forward(net, x):
        x = F.max_pool2d(F.relu(net.a(x)), 2)
        return net.out(net.m(x.reshape(x.shape[0], -1) if size is None else x.reshape(-1, size)))

    return Net(forward, a=nn.Conv2d(3, 8, 3, padding=1), m=mlp(128, 24), out=nn.Linear(128, 3))


def spectral(net, x):  # a Fourier layer
    x = net.a(x)
    y = torch.fft.irfft2(torch.fft.rfft2(x) * net.filter, s=x.shape[2:])
    return net.out(F.relu(y + x))


def spectral_mixing(net, x):
    x = net.a(x)
    y = torch.einsum("bixy,io->boxy", torch.fft.rfft2(x), torch.view_as_complex(net.mix))
    return net.out(F.relu(torch.fft.irfft2(y, s=x.shape[2:]) + x))


def running_sum(net, x):
    x = net.a(x)
    return net.out(net.b(x).sigmoid() * torch.cumsum(x, 1))


def causal(net, x):
    x = x.transpose(1, 2)
    x = net.a(x)
    for layer in net.layers:
        x = x + F.relu(layer(x)[..., : -layer.padding[0]])
    return net.out(x)


def gated_pair(net, x):  # the feed-forward layer of language models
    x = net.a(x)
    return net.out(x + net.down(F.silu(net.gate(x)) * net.up(x)))


def tied(net, x):
    return F.linear(net.m(net.embed(x)), net.embed.weight)


def positions(net, x):
    x = net.embed(x) + net.place[:, : x.shape[1]]
    return net.out(x + net.m(x))


def outer(net, x):
    a, b = net.a(x), net.b(x)
    return net.out((a[:, :, None] * b[:, None]).flatten(1))


def chosen(net, x):  # the largest channels
    return net.out(net.m(net.a(x)).topk(4, -1).values)


def noise(net, x):
    return net.out(F.relu(net.a(x) * net.table))


def by_name(net, x):
    for name in ("first", "second"):
        x = F.relu(getattr(net, name)(x))
    return {"logits": net.out(x)}["logits"]


def pyramid(net, x):
    x = net.a(x)
    pooled = [F.adaptive_avg_pool2d(x, n).flatten(2) for n in (1, 2)]
    return net.out(torch.cat(pooled, 2).transpose(1, 2))
