"""Hand-written networks by name, each as small as it can be."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.elastic.handwritten_forwards import (
    IMAGE,
    ROWS,
    STEPS,
    TOKENS,
    ChannelNorm,
    Net,
    RootMeanSquare,
    by_name,
    causal,
    cell_zeros,
    channel_softmax,
    chosen,
    conv_lstm,
    dense,
    efficient_channel_attention,
    film,
    flattened,
    functional_norm,
    gated_pair,
    gru_zeros,
    halves_added,
    heads_of,
    highway,
    keyword_state,
    l2_normalised,
    learned_state,
    lstm_by_hand,
    lstm_new_zeros,
    maxout,
    mlp,
    multihead,
    negated_too,
    non_local,
    one_head,
    outer,
    outputs_of_given_size,
    packed,
    parameter,
    positions,
    pyramid,
    running_sum,
    shuffle,
    spectral,
    spectral_mixing,
    squeeze_excite,
    tied,
    up_and_down,
    var_mean_norm,
)


def conv(n=16, k=3):
    return nn.Conv2d(3, n, k, padding=k // 2)


def linear(n=16):
    return nn.Linear(5, n)


# name -> (network, input shape)
NETS: dict = {
    "gru-zeros": (
        lambda: Net(gru_zeros, rnn=nn.GRU(5, 16, 2, batch_first=True), out=nn.Linear(16, 3), hidden=16),
        STEPS,
    ),
    "lstm-new-zeros": (
        lambda: Net(lstm_new_zeros, rnn=nn.LSTM(5, 12, 2, batch_first=True, bidirectional=True), out=nn.Linear(48, 3)),
        STEPS,
    ),
    "cell-zeros": (lambda: Net(cell_zeros, cell=nn.LSTMCell(5, 16), out=nn.Linear(16, 3), hidden=16), STEPS),
    "keyword-state": (
        lambda: Net(keyword_state, rnn=nn.GRU(5, 16, batch_first=True), out=nn.Linear(16, 3)),
        STEPS,
    ),
    "learned-state": (
        lambda: Net(
            learned_state, rnn=nn.GRU(5, 16, batch_first=True), out=nn.Linear(16, 3), start=parameter(1, 1, 16)
        ),
        STEPS,
    ),
    "lstm-by-hand-zeros": (lambda: lstm_by_hand(lambda net, x: torch.zeros(x.shape[0], 12)), STEPS),
    "lstm-by-hand-started": (lambda: lstm_by_hand(lambda net, x: net.start(x[:, 0])), STEPS),
    "outputs-of-given-size": (
        lambda: Net(outputs_of_given_size, cell=nn.GRUCell(5, 12), out=nn.Sequential(mlp(12, 8), nn.Linear(12, 3))),
        STEPS,
    ),
    "conv-lstm": (
        lambda: Net(conv_lstm, a=conv(), gates=nn.Conv2d(32, 64, 3, padding=1), out=nn.Conv2d(16, 2, 1)),
        IMAGE,
    ),
    "channel-norm": (
        lambda: Net(
            lambda net, x: net.out(net.norm(net.a(x))), a=conv(), norm=ChannelNorm(16), out=nn.Conv2d(16, 2, 1)
        ),
        IMAGE,
    ),
    "rms-norm": (
        lambda: Net(
            lambda net, x: net.out(net.norm(net.a(x))), a=linear(), norm=RootMeanSquare(16), out=nn.Linear(16, 3)
        ),
        STEPS,
    ),
    "functional-norm": (
        lambda: Net(functional_norm, a=linear(), gain=parameter(16), shift=parameter(16), out=nn.Linear(16, 3)),
        STEPS,
    ),
    "var-mean-norm": (lambda: Net(var_mean_norm, a=linear(), out=nn.Linear(16, 3)), STEPS),
    "l2-normalised": (lambda: Net(l2_normalised, a=linear(), out=nn.Linear(16, 3)), STEPS),
    "one-head": (
        lambda: Net(
            one_head,
            a=linear(),
            **{name: nn.Linear(16, 8) for name in "qkv"},
            back=nn.Linear(8, 16),
            out=nn.Linear(16, 3),
        ),
        STEPS,
    ),
    "heads-of-any-size": (lambda: heads_of(lambda y, b, t, c: y.view(b, t, 4, -1)), STEPS),
    "any-number-of-heads": (lambda: heads_of(lambda y, b, t, c: y.view(b, t, -1, 4)), STEPS),
    "heads-of-the-embedding": (lambda: heads_of(lambda y, b, t, c: y.view(b, t, 4, c // 4)), STEPS),
    "heads-by-unflatten": (
        lambda: heads_of(lambda y, b, t, c: y.unflatten(-1, (4, 4)), F.scaled_dot_product_attention),
        STEPS,
    ),
    "packed-attention": (
        lambda: Net(packed, a=linear(), qkv=nn.Linear(16, 48), back=nn.Linear(16, 16), out=nn.Linear(16, 3)),
        STEPS,
    ),
    "multihead": (
        lambda: Net(
            multihead,
            a=linear(),
            attention=nn.MultiheadAttention(16, 4, batch_first=True),
            m=mlp(16, 24),
            out=nn.Linear(16, 3),
        ),
        STEPS,
    ),
    "non-local": (
        lambda: Net(
            non_local,
            a=conv(),
            **{name: nn.Conv2d(16, 8, 1) for name in "qkv"},
            back=nn.Conv2d(8, 16, 1),
            out=nn.Conv2d(16, 2, 1),
        ),
        IMAGE,
    ),
    "squeeze-excite": (
        lambda: Net(squeeze_excite, a=conv(), fc1=nn.Linear(16, 8), fc2=nn.Linear(8, 16), out=nn.Conv2d(16, 2, 1)),
        IMAGE,
    ),
    "efficient-channel-attention": (
        lambda: Net(efficient_channel_attention, a=conv(), over=nn.Conv1d(1, 1, 3, padding=1), out=nn.Conv2d(16, 2, 1)),
        IMAGE,
    ),
    "film": (lambda: Net(film, a=conv(), condition=nn.Linear(3, 32), out=nn.Conv2d(16, 2, 1)), IMAGE),
    "highway": (
        lambda: Net(highway, a=linear(), gate=nn.Linear(16, 16), b=nn.Linear(16, 16), out=nn.Linear(16, 3)),
        STEPS,
    ),
    "channel-softmax": (
        lambda: Net(channel_softmax, a=linear(), gate=nn.Linear(16, 16), out=nn.Linear(16, 3)),
        STEPS,
    ),
    "shuffle": (lambda: Net(shuffle, a=conv(), b=nn.Conv2d(16, 12, 3, groups=4), out=nn.Conv2d(12, 2, 1)), IMAGE),
    "negated-too": (lambda: Net(negated_too, a=conv(), out=nn.Conv2d(32, 2, 1)), IMAGE),
    "maxout": (lambda: Net(maxout, a=nn.Linear(6, 32), out=nn.Sequential(mlp(16, 24), nn.Linear(16, 3))), ROWS),
    "halves-added": (lambda: Net(halves_added, a=conv(24), out=nn.Conv2d(12, 2, 1)), IMAGE),
    "dense": (
        lambda: Net(
            dense,
            a=conv(8),
            layers=nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3)),
            out=nn.Conv2d(20, 2, 1),
        ),
        IMAGE,
    ),
    "up-and-down": (
        lambda: Net(up_and_down, a=conv(), down=nn.Conv2d(16, 24, 2, 2), out=nn.Conv2d(40, 2, 1)),
        IMAGE,
    ),
    "flattened": (lambda: flattened(None), IMAGE),
    "flattened-to-a-given-size": (lambda: flattened(128), IMAGE),
    "spectral": (
        lambda: Net(spectral, a=conv(), filter=parameter(16, 1, 1), out=nn.Conv2d(16, 2, 1)),
        IMAGE,
    ),
    "spectral-mixing": (
        lambda: Net(spectral_mixing, a=conv(), mix=parameter(16, 16, 2), out=nn.Conv2d(16, 2, 1)),
        IMAGE,
    ),
    "running-sum": (lambda: Net(running_sum, a=linear(), b=nn.Linear(16, 16), out=nn.Linear(16, 3)), STEPS),
    "causal": (
        lambda: Net(
            causal,
            a=nn.Conv1d(5, 16, 1),
            layers=nn.ModuleList(nn.Conv1d(16, 16, 2, dilation=2**i, padding=2**i) for i in range(2)),
            out=nn.Conv1d(16, 3, 1),
        ),
        STEPS,
    ),
    "gated-pair": (
        lambda: Net(
            gated_pair,
            a=linear(),
            gate=nn.Linear(16, 24),
            up=nn.Linear(16, 24),
            down=nn.Linear(24, 16),
            out=nn.Linear(16, 3),
        ),
        STEPS,
    ),
    "tied": (lambda: Net(tied, embed=nn.Embedding(10, 16), m=mlp(16, 24)), TOKENS),
    "positions": (
        lambda: Net(
            positions, embed=nn.Embedding(10, 16), place=parameter(1, 9, 16), m=mlp(16, 24), out=nn.Linear(16, 3)
        ),
        TOKENS,
    ),
    "outer": (
        lambda: Net(outer, a=nn.Linear(6, 4), b=nn.Linear(6, 4), out=nn.Sequential(mlp(16, 24), nn.Linear(16, 3))),
        ROWS,
    ),
    "chosen": (lambda: Net(chosen, a=nn.Linear(6, 16), m=mlp(16, 24), out=nn.Linear(4, 3)), ROWS),
    "weight-norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(6, 16)), nn.ReLU(), mlp(16, 24), nn.Linear(16, 3)
        ),
        ROWS,
    ),
    "by-name": (
        lambda: Net(by_name, first=nn.Linear(6, 16), second=nn.Linear(16, 12), out=nn.Linear(12, 3)),
        ROWS,
    ),
    "pyramid": (lambda: Net(pyramid, a=conv(), out=nn.Linear(16, 3)), IMAGE),
}
