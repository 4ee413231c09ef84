"""Band-split RNN for source separation (Luo & Yu, arXiv 2209.15174), the network of Subnetwork-to-go (2312.03464)."""

import torch
from torch import Tensor, nn

# Bins per band of the paper's split V7 (44.1 kHz, 2048-point transform): 100 Hz bands up to 1 kHz, 250 Hz up to 4 kHz,
# 500 Hz up to 8 kHz, 1 kHz up to 16 kHz, 2 kHz up to 20 kHz, and the rest; 1025 bins in 41 bands.
V7_BANDS = [5, 5, 4, 5, 5, 4, 5, 5, 4, 5] + [12] * 12 + [23] * 8 + [47] * 8 + [93] * 2 + [88]


class ResidualRNN(nn.Module):
    """Norm, bidirectional LSTM over the second dimension and a linear layer back, added to the input."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, features)
        self.rnn = nn.LSTM(features, hidden, batch_first=True, bidirectional=True)
        self.proj = nn.Linear(2 * hidden, features)

    def forward(self, x: Tensor) -> Tensor:  # (b, steps, n) -> (b, steps, n)
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        h, _ = self.rnn(h)
        return x + self.proj(h)


class BandSequenceBlock(nn.Module):
    """One layer: over time within each band, then over the bands within each frame."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.time = ResidualRNN(features, hidden)
        self.band = ResidualRNN(features, hidden)

    def forward(self, x: Tensor) -> Tensor:  # (b, bands, frames, n) -> the same
        b, bands, frames = x.shape[:3]
        x = self.time(x.flatten(0, 1)).unflatten(0, (b, bands))
        x = x.transpose(1, 2).flatten(0, 1)
        return self.band(x).unflatten(0, (b, frames)).transpose(1, 2)


class BandSplit(nn.Module):
    """A norm and a linear layer of its own for each band."""

    def __init__(self, sizes: list[int], features: int):
        super().__init__()
        self.sizes = sizes
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes)
        self.fcs = nn.ModuleList(nn.Linear(size, features) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:  # (b, frames, sum of sizes) -> (b, bands, frames, n)
        parts = x.split(self.sizes, -1)
        return torch.stack([fc(norm(part)) for part, norm, fc in zip(parts, self.norms, self.fcs, strict=True)], 1)


class MaskEstimator(nn.Module):
    """For one band: norm, linear, tanh, linear, and a gated linear unit that gives the complex mask."""

    def __init__(self, features: int, hidden: int, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, size)
        self.fc3 = nn.Linear(size, 2 * size)
        self.glu = nn.GLU(-1)

    def forward(self, x: Tensor) -> Tensor:  # (b, frames, n) -> (b, frames, size)
        return self.glu(self.fc3(self.fc2(self.fc1(self.norm(x)).tanh())))


class BSRNN(nn.Module):
    """Estimates one source from the spectrum of a mixture.

    The default is the published size: 41 bands, 12 layers, N = 128, H = 256; 27.3 M weights (27.5 M with biases and
    norms) and 219 GMAC for 3 seconds of 44.1 kHz stereo.

    Args:
        features: N, the channels of each band.
        hidden: H, hidden size of each direction of the LSTMs.
        layers: depth.
        bands: bins of each band; None for ``V7_BANDS``.
        channels: audio channels.
        mask_hidden: hidden size of the mask MLPs; None for 4 N.
    """

    def __init__(
        self,
        features: int = 128,
        hidden: int = 256,
        layers: int = 12,
        bands: list[int] | None = None,
        channels: int = 2,
        mask_hidden: int | None = None,
    ):
        super().__init__()
        self.bands = list(bands or V7_BANDS)
        sizes = [2 * channels * bins for bins in self.bands]
        self.split = BandSplit(sizes, features)
        self.blocks = nn.Sequential(*(BandSequenceBlock(features, hidden) for _ in range(layers)))
        self.masks = nn.ModuleList(MaskEstimator(features, mask_hidden or 4 * features, size) for size in sizes)

    def forward(self, spectrum: Tensor) -> Tensor:
        """``(b, frames, bins * channels * 2)`` to the mask of that shape; ``pack`` says in which order."""
        x = self.blocks(self.split(spectrum))
        return torch.cat([mask(band) for mask, band in zip(self.masks, x.unbind(1), strict=True)], -1)

    def separate(self, mixture: Tensor, window: Tensor, hop: int) -> Tensor:
        """Waveform ``(b, channels, samples)`` to the estimated source of that shape, through ``torch.stft``."""
        shape, size = mixture.shape, window.shape[0]
        spectrum = torch.stft(mixture.flatten(0, 1), size, hop, window=window, return_complex=True)
        spectrum = spectrum.unflatten(0, shape[:2])  # (b, channels, bins, frames)
        mask = unpack(self(pack(spectrum)), shape[1])
        masked = (spectrum * mask).flatten(0, 1)
        return torch.istft(masked, size, hop, window=window, length=shape[-1]).unflatten(0, shape[:2])


def pack(spectrum: Tensor) -> Tensor:  # complex (b, channels, bins, frames) -> (b, frames, bins * channels * 2)
    """Bins outermost, then channels, then real and imaginary part: a band is one slice of the last dimension."""
    return torch.view_as_real(spectrum).permute(0, 3, 2, 1, 4).flatten(2)


def unpack(packed: Tensor, channels: int) -> Tensor:
    """The inverse of ``pack``."""
    parts = packed.unflatten(-1, (-1, channels, 2)).permute(0, 3, 2, 1, 4)
    return torch.view_as_complex(parts.contiguous())
