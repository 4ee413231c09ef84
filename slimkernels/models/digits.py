"""The small digit classifier whose trained weights the demo uses."""

from collections.abc import Sequence

from torch import Tensor, nn


class DigitCNN(nn.Module):
    """Three 3x3 convolutions, each with ReLU and 2x2 max pooling, then two linear layers; 390,410 parameters.

    ``channels`` and ``hidden`` set the widths: ``DigitCNN((16, 32, 64), 128)`` is the plain network at width 0.5.
    """

    def __init__(
        self, channels: Sequence[int] = (32, 64, 128), hidden: int = 256, classes: int = 10, in_channels: int = 1
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in zip((in_channels, *channels), channels, strict=False):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.conv_layers = nn.Sequential(*layers)
        self.fc_layers = nn.Sequential(nn.Linear(channels[-1] * 9, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, x: Tensor) -> Tensor:  # (b, in_channels, 28, 28) -> (b, classes)
        return self.fc_layers(self.conv_layers(x).flatten(1))
