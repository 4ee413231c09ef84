"""Slimmable LSTM and GRU, and their cells."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from slimkernels.nn._base import SlimModule
from slimkernels.ops.slim_gru import slim_gru
from slimkernels.ops.slim_lstm import slim_lstm


def _cut(state: Tensor | None, active: int, full: int) -> Tensor | None:
    """The active part of a state of the full size, which a network that writes the size out makes at every width."""
    if state is None or state.shape[-1] == active or state.shape[-1] != full:
        return state
    return state.narrow(-1, 0, active)


class _SlimRecurrent(SlimModule, nn.RNNBase):
    """What SlimLSTM and SlimGRU share. They extend RNNBase and not LSTM and GRU: torch.compile breaks the graph at those.

    The parameters are the only copy of the weights: RNNBase's list of flat weights, which a parametrization or a swapped
    parameter leaves behind, is not read.
    """

    _mode: str

    def __init__(self, *args, in_blocks: int = 1, recompute: bool = False, **kwargs) -> None:
        super().__init__(self._mode, *args, **kwargs)
        if in_blocks < 1 or self.input_size % in_blocks:
            raise ValueError(
                f"{type(self).__name__}: expected in_blocks to divide input_size={self.input_size}, got {in_blocks}"
            )
        self.in_blocks, self.recompute = in_blocks, recompute
        self._init_width(self.hidden_size)

    def _init_slim(self) -> None:
        """What a layer of torch that becomes this one lacks."""
        self.in_blocks, self.recompute = 1, False
        self._init_width(self.hidden_size)

    @property
    def width(self) -> int:
        """Active hidden size of each direction; the output has ``width * num_directions`` features."""
        return self._width.shape[0]

    def _weights(self) -> list[Tensor]:
        # A parametrized weight is no parameter; the others are read from the dictionary, which costs a tenth of getattr.
        parameters = self._parameters
        weights: list = [parameters[n] if n in parameters else getattr(self, n) for n in self._flat_weights_names]
        if self.in_index is not None:
            per_direction = len(self._all_weights[0])
            for at in range(0, per_direction * (2 if self.bidirectional else 1), per_direction):
                weights[at] = weights[at].index_select(1, self.in_index)[:]  # a view, of which no copy is kept
        return weights

    def _options(self) -> dict:
        return {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "in_blocks": 1 if self.in_index is not None else self.in_blocks,
            "dropout": self.dropout if self.training else 0.0,
            "recompute": self.recompute,
        }

    def _run(self, x: Tensor, states: list[Tensor | None], batch_sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError

    def _forward(
        self, x: Tensor | PackedSequence, states: list[Tensor | None]
    ) -> tuple[Tensor | PackedSequence, list[Tensor]]:
        if isinstance(x, Tensor) and x.dim() == 3 and not self.batch_first:
            return self._run(x, states, None)
        if isinstance(x, PackedSequence):
            data, batch_sizes, order, back = x
            if order is not None:
                states = [None if s is None else s.index_select(1, order) for s in states]
            y, finals = self._run(data, states, batch_sizes)
            if back is not None:
                finals = [s.index_select(1, back) for s in finals]
            return PackedSequence(y, batch_sizes, order, back), finals
        if x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: expected input to have 2 or 3 dimensions, got {tuple(x.shape)}")
        if x.dim() == 2:
            y, finals = self._run(x.unsqueeze(1), [None if s is None else s.unsqueeze(1) for s in states], None)
            return y.squeeze(1), [s.squeeze(1) for s in finals]
        y, finals = self._run(x.transpose(0, 1), states, None)
        return y.transpose(0, 1), finals

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}"


class SlimLSTM(_SlimRecurrent):
    """``nn.LSTM`` that runs on the first ``width`` hidden units of each gate (``set_width``) and as many inputs as it is given.

    Same constructor, state_dict keys and initialisation as ``nn.LSTM``; at full width equal to it. Of initial states of the
    full size the first units are taken. See ``slimkernels.ops.slim_lstm``.

    Args:
        in_blocks: equal parts of the input, each cut to its first entries; 2 after a bidirectional layer.
        recompute: compute the gates again in backward instead of keeping them.
    """

    _mode = "LSTM"

    def __init__(self, *args, in_blocks: int = 1, recompute: bool = False, **kwargs) -> None:
        super().__init__(*args, in_blocks=in_blocks, recompute=recompute, **kwargs)
        self._proj = torch.empty((self.proj_size, 0))

    def _init_slim(self) -> None:
        super()._init_slim()
        self._proj = torch.empty((self.proj_size, 0))

    @property
    def proj_width(self) -> int:
        """Active size of the projection, 0 without one; the output then has ``proj_width * num_directions`` features."""
        return self._proj.shape[0]

    def set_proj_width(self, p: int | None) -> None:
        """Project to the first ``p`` outputs from now on; None means all of them.

        Raises: ValueError when ``p`` is not between 1 and ``proj_size``.
        """
        p = self.proj_size if p is None else p
        if not isinstance(p, int) or not min(1, self.proj_size) <= p <= self.proj_size:
            raise ValueError(f"SlimLSTM: expected a projection width between 1 and {self.proj_size}, got {p}")
        self._proj = torch.empty((p, 0))

    def _run(self, x, states, batch_sizes):
        width, projected = self.width, self.proj_width
        h0 = _cut(states[0], projected or width, self.proj_size or self.hidden_size)
        c0 = _cut(states[1], width, self.hidden_size)
        y, finals = slim_lstm(
            x,
            self._weights(),
            width,
            None if h0 is None or c0 is None else (h0, c0),
            proj_size=projected or None,
            batch_sizes=batch_sizes,
            **self._options(),
        )
        return y, list(finals)

    def forward(
        self,
        input: Tensor | PackedSequence,  # (steps, batch, i), (batch, steps, i) with batch_first, or (steps, i)
        hx: tuple[Tensor, Tensor] | None = None,  # (num_layers * D, batch, p) and (num_layers * D, batch, h)
    ):  # (*, D * p) and the final states, p = h without projection
        y, (h_n, c_n) = self._forward(input, [None, None] if hx is None else list(hx))
        return y, (h_n, c_n)


class SlimGRU(_SlimRecurrent):
    """``nn.GRU`` that runs on the first ``width`` hidden units of each gate (``set_width``) and as many inputs as it is given.

    Same constructor, state_dict keys and initialisation as ``nn.GRU``; at full width equal to it. Of an initial state of the
    full size the first units are taken. See ``slimkernels.ops.slim_gru``.

    Args:
        in_blocks: equal parts of the input, each cut to its first entries; 2 after a bidirectional layer.
        recompute: compute the gates again in backward instead of keeping them.
    """

    _mode = "GRU"

    def __init__(self, *args, in_blocks: int = 1, recompute: bool = False, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(*args, in_blocks=in_blocks, recompute=recompute, **kwargs)

    def _run(self, x, states, batch_sizes):
        width = self.width
        h0 = _cut(states[0], width, self.hidden_size)
        y, h_n = slim_gru(x, self._weights(), width, h0, batch_sizes=batch_sizes, **self._options())
        return y, [h_n]

    def forward(
        self,
        input: Tensor | PackedSequence,  # (steps, batch, i), (batch, steps, i) with batch_first, or (steps, i)
        hx: Tensor | None = None,  # (num_layers * D, batch, h)
    ):  # (*, D * h) and the final state
        y, (h_n,) = self._forward(input, [hx])
        return y, h_n


class _SlimCell(SlimModule, nn.RNNCellBase):
    """What the cells share: one step is a layer of one step."""

    in_blocks: int

    def _init_cell(self, in_blocks: int, input_size: int, hidden_size: int) -> None:
        if in_blocks < 1 or input_size % in_blocks:
            raise ValueError(
                f"{type(self).__name__}: expected in_blocks to divide input_size={input_size}, got {in_blocks}"
            )
        self.in_blocks = in_blocks
        self._init_width(hidden_size)

    def _init_slim(self) -> None:
        """What a cell of torch that becomes this one lacks."""
        self.in_blocks = 1
        self._init_width(self.hidden_size)

    def _arguments(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if x.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: expected input to have 1 or 2 dimensions, got {tuple(x.shape)}")
        # A view of the copy: what is made anew in each call is not kept packed.
        w_ih = self.weight_ih if self.in_index is None else self.weight_ih.index_select(1, self.in_index)[:]
        weights = [w_ih, self.weight_hh]
        if self.bias:
            weights += [self.bias_ih, self.bias_hh]
        return x.reshape(1, -1, x.shape[-1]), weights

    def _state(self, state: Tensor) -> Tensor:
        found = _cut(state.reshape(1, -1, state.shape[-1]), self.width, self.hidden_size)
        assert found is not None
        return found

    def _blocks(self) -> int:
        return 1 if self.in_index is not None else self.in_blocks


class SlimLSTMCell(_SlimCell, nn.LSTMCell):
    """``nn.LSTMCell`` that runs on the first ``width`` hidden units of each gate and as many inputs as it is given."""

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None, *, in_blocks: int = 1
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._init_cell(in_blocks, input_size, hidden_size)

    def forward(
        self,
        input: Tensor,  # (batch, i) or (i,)
        hx: tuple[Tensor, Tensor] | None = None,  # (batch, h) or (h,)
    ) -> tuple[Tensor, Tensor]:
        x, weights = self._arguments(input)
        shape = (*input.shape[:-1], self.width)
        state = None if hx is None else (self._state(hx[0]), self._state(hx[1]))
        _, (h, c) = slim_lstm(x, weights, self.width, state, in_blocks=self._blocks())
        return h.view(shape), c.view(shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}"


class SlimGRUCell(_SlimCell, nn.GRUCell):
    """``nn.GRUCell`` that runs on the first ``width`` hidden units of each gate and as many inputs as it is given."""

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None, *, in_blocks: int = 1
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._init_cell(in_blocks, input_size, hidden_size)

    def forward(
        self,
        input: Tensor,  # (batch, i) or (i,)
        hx: Tensor | None = None,  # (batch, h) or (h,)
    ) -> Tensor:
        x, weights = self._arguments(input)
        state = None if hx is None else self._state(hx)
        _, h = slim_gru(x, weights, self.width, state, in_blocks=self._blocks())
        return h.view((*input.shape[:-1], self.width))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}"
