"""The coordinate networks of a set of tensors, stacked as ``ops.inr_weights`` takes them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slimkernels.hyper.targets import Target
from slimkernels.ops import InrParameters, InrTensor, inr_weights
from slimkernels.reference.inr_weights import AXES, axis_columns, encode_axis

_BIAS_SHARE = 0.05  # of the original's size: as in random initialisation, biases start near zero


class InrNetworks(nn.Module):
    """One multi-layer perceptron a tensor, or one for all; generates all the tensors in one call.

    Args:
        first, total: the place of the first tensor among all that the generator makes, and their number.
        norm: divides the coordinates that say how large the network is.
        compat: as in ``ops.inr_weights``.
        size_bands: frequencies of the active sizes; with more than a few, the weights at a width that was never trained
            have nothing to do with those at its neighbours. Coordinates that are the same for all that a network makes
            get none then: noise on them would move all its weights together. None: all coordinates get all bands.
        skip: the residual scalars at the start.
        zero: start with an output of zero.
        standardized: every output channel of a matrix has mean 0 and the variance 2 / inputs, times a learned number a
            tensor, at every width; "centered": what the output channels have in common is taken out before.
        absolute: a channel has the same position at every width, and only the coordinates of the active sizes change: the
            weights are those of the full-width positions, cut to the active channels.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        first: int,
        total: int,
        norm: float,
        compat: str,
        hidden: int,
        layers: int,
        bands: int,
        outputs: int,
        activation: str,
        shared: bool,
        zero: bool,
        size_bands: int | None,
        skip: float,
        standardized: bool | str,
        absolute: bool,
    ) -> None:
        super().__init__()
        self.absolute = absolute
        self.targets, self.norm, self.activation, self.compat = tuple(targets), norm, activation, compat
        self.tensors: list[InrTensor] = [
            t.inr(first + i, total, 0 if shared else i, absolute) for i, t in enumerate(self.targets)
        ]
        count, depth, encoding = 1 if shared else len(targets), layers - 1, 6 + 12 * bands
        groups = [self.targets] if shared else [(target,) for target in self.targets]
        used = torch.stack([_used_columns(group, bands, size_bands, compat) for group in groups])[:, None]  # (P, 1, E)
        self.register_buffer("used", None if used.all() else used, persistent=False)
        self.w_in = nn.Parameter(_uniform(encoding, count, hidden, encoding) * used)
        self.b_in = nn.Parameter(_uniform(encoding, count, hidden))
        self.w_hidden = nn.Parameter(_uniform(hidden, count, depth, hidden, hidden))
        self.b_hidden = nn.Parameter(_uniform(hidden, count, depth, hidden))
        self.skip = nn.Parameter(torch.full((count, depth), float(skip)))
        self.w_out = nn.Parameter(_uniform(hidden, count, outputs, hidden) * (0 if zero else 1))
        self.b_out = nn.Parameter(_uniform(hidden, count, outputs) * (0 if zero else 1))
        self.scale = nn.Parameter(torch.ones(len(targets)))
        self.gain = nn.Parameter(torch.ones(len(targets))) if standardized else None
        self.centered = standardized == "centered"

    @property
    def names(self) -> list[str]:
        return [target.name for target in self.targets]

    def forward(
        self,
        units: Mapping[str, int],
        originals: Mapping[str, Tensor] | None,  # full tensors whose slices are added
        dtypes: Sequence[torch.dtype],
        *,
        noise: str,
        seed: int | Tensor | None,
        samples: int,
        first_sample: int,
    ) -> dict[str, Tensor]:
        w_in = self._w_in()
        cut = [i for i, t in enumerate(self.targets) if self.absolute and not t.leading(units)]
        b_in, scale = self._at_width(w_in, units, cut) if cut else (self.b_in, self.scale)
        base, read = None, None if self.absolute else units  # of a full tensor the op takes the leading slice
        if originals is not None:
            base = [t.base(originals[t.name], read).float() for t in self.targets]
        generated = inr_weights(
            InrParameters(w_in, b_in, self.w_hidden, self.b_hidden, self.skip, self.w_out, self.b_out),
            self.tensors,
            [t.whole() if i in cut else t.active(units) for i, t in enumerate(self.targets)],
            norm=self.norm,
            base=base,
            scale=scale,
            activation=self.activation,
            compat=self.compat,
            noise=noise,
            seed=seed,
            samples=samples,
            first_sample=first_sample,
            dtype=torch.float32 if self.w_in.dtype != torch.float64 else None,
        )
        weights = {}
        for i, (target, w, dtype) in enumerate(zip(self.targets, generated, dtypes, strict=True)):
            w = target.taken(w.reshape(target.shape), units) if i in cut else w.reshape(target.shape_at(units))
            if self.gain is not None and target.layout != "bias":
                channel = 1 if target.layout == "iohw" else 0
                if self.centered and w.shape[channel] > 1:
                    w = w - w.mean(channel, keepdim=True)
                w = _standardized(w, channel) * self.gain[i]
            weights[target.name] = w.to(dtype)
        return weights

    def _at_width(
        self, w_in: Tensor, units: Mapping[str, int], cut: Sequence[int]
    ) -> tuple[Tensor, Tensor]:  # (T, H), (T,)
        """The first layer's bias and the scales with which the tensors ``cut``, generated at full size as their active
        channels are not the first ones, are those of another width: with the coordinates of the active sizes, and
        divided by the active inputs."""
        moved = torch.zeros(w_in.shape[0], w_in.shape[2], dtype=torch.float64)
        bands = (w_in.shape[2] - AXES) // (2 * AXES)
        share = [1.0] * len(self.targets)
        for i in cut:
            active, whole = self.targets[i].active(units), self.targets[i].whole()
            share[i] = whole[1] / active[1]
            for axis, sizes in zip((4, 5), zip(active, whole, strict=True), strict=True):
                encoded = encode_axis(torch.tensor(sizes, dtype=torch.float64) / self.norm, bands)
                moved[i, axis_columns(axis, bands, self.compat)] = encoded[0] - encoded[1]
        b_in = self.b_in + torch.einsum("the,te->th", w_in, moved.to(w_in))
        return b_in, self.scale * self.scale.new_tensor(share)

    def _w_in(self) -> Tensor:
        used = self.get_buffer("used") if self._buffers["used"] is not None else None
        return self.w_in if used is None else self.w_in * used

    def factors(self, index: int) -> Tensor:
        """The parameter whose entry ``index`` multiplies a tensor."""
        bias = self.targets[index].layout == "bias"
        return self.scale if self.gain is None or bias else self.gain

    @torch.no_grad()
    def scale_to(self, units: Mapping[str, int], originals: Mapping[str, Tensor]) -> None:
        """Let an output of one stand for a change as large as the original's root mean square, in every tensor: one
        learning rate then fits matrices, whose outputs are divided by their inputs, and biases."""
        for i, target in enumerate(self.targets):
            size = originals[target.name].float().square().mean().sqrt() * target.active(units)[1]
            self.scale[i] = size.clamp(1e-3, 1e3)

    @torch.no_grad()
    def match(self, units: Mapping[str, int], originals: Mapping[str, Tensor]) -> None:
        """Start every tensor with mean 0 and as large as the original at full width, by its scale and its network's
        last bias (a bias that all tensors share stays). A layer's bias starts small."""
        self.scale.fill_(1)
        dtypes = [torch.float32] * len(self.targets)
        made = self(units, None, dtypes, noise="none", seed=None, samples=1, first_sample=0)
        for i, target in enumerate(self.targets):
            w, wanted = made[target.name].float(), originals[target.name].float().square().mean().sqrt()
            mean = w.mean() if len(self.w_in) == len(self.targets) else w.new_zeros(())
            if mean:
                self.b_out[self.tensors[i].mlp] -= mean * target.active(units)[1]
            size = (w - mean).square().mean().sqrt()
            share = _BIAS_SHARE if target.layout == "bias" else 1.0
            self.scale[i] = (share * wanted / size).clamp(1e-3, 1e3) if size > 0 else 1.0

    def of(self, index: int) -> list[Tensor]:
        """The parameters of one tensor's network."""
        at = self.tensors[index].mlp
        stacked = (self.w_in, self.b_in, self.w_hidden, self.b_hidden, self.skip, self.w_out, self.b_out)
        return [p[at] for p in stacked] + [self.scale[index]]


def _standardized(w: Tensor, channel: int) -> Tensor:
    """Each output channel with mean 0 and mean square 2 / inputs: outputs of a ReLU layer keep their variance, and a
    change that all weights of a channel share changes nothing. (Qiao et al., Weight Standardization, arXiv 1903.10520)"""
    inputs = tuple(d for d in range(w.dim()) if d != channel)
    centered = w - w.mean(inputs, keepdim=True)
    inverse = (centered.square().mean(inputs, keepdim=True) + 1e-10).rsqrt()
    return centered * (inverse * math.sqrt(2 * w.shape[channel] / w.numel()))


def _used_columns(targets: Sequence[Target], bands: int, size_bands: int | None, compat: str) -> Tensor:
    """1 for the columns of the encoding that a network uses that makes ``targets``, else 0."""
    used = torch.ones(AXES + 2 * AXES * bands)
    if size_bands is None:
        return used
    kept = {3: 0, 4: size_bands, 5: size_bands}
    if len(targets) == 1:
        outputs, inputs = targets[0].positions()
        kept |= {0: 0} | ({1: 0} if outputs == 1 else {}) | ({2: 0} if inputs == 1 else {})
    for axis, count in kept.items():
        used[axis_columns(axis, bands, compat)[1 + 2 * count :]] = 0
    return used


def _uniform(fan_in: int, *shape: int) -> Tensor:
    """As ``nn.Linear`` initialises its weight and bias."""
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in)


def auto_bands(targets: Sequence[Target], units: Mapping[str, int]) -> int:
    """Bands with a frequency at or above log2(2 C) carry nothing for C positions."""
    most = 1
    for target in targets:
        c_out, c_in = target.active(units)
        most = max(most, -(-c_out // target.tile[0]), -(-c_in // target.tile[1]))
    return max(1, math.ceil(math.log2(2 * most)))
