"""A plain convolutional network for small images."""

from torch import Tensor, nn


class CNN(nn.Module):
    """Stages of 3×3 convolution → GroupNorm → GELU → 2×2 max-pooling, then a linear classifier.

    GroupNorm and not BatchNorm: its result does not depend on who else is in the micro-batch, so the loss stays the
    same on any number of ranks (Wu & He 2018).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...] = (32, 64, 128),
        depth: int = 1,
        dropout: float = 0.0,
    ) -> None:
        """`channels` per stage; `depth` convolutions in each."""
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for number, width in enumerate(channels):
            for _ in range(depth):
                norm = nn.GroupNorm(_groups(width), width)
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), norm, nn.GELU()]
                before = width
            if number < len(channels) - 1:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        # Four quarters, not one mean: where a stroke is tells a 6 from a 9.
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * before, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[batch, channels, height, width] → logits [batch, classes]."""
        return self.classifier(self.dropout(self.pool(self.features(pixel_values))))


def _groups(width: int) -> int:
    """The most groups up to 8 that divide `width`."""
    return next(groups for groups in range(8, 0, -1) if width % groups == 0)
