"""A plain convolutional network for small images."""

from torch import Tensor, nn


class CNN(nn.Module):
    """Stages of 3×3 convolution → GroupNorm → GELU → 2×2 max-pooling, then a linear classifier.

    GroupNorm and not BatchNorm: its result does not depend on the other images of the micro-batch,
    so the loss stays the same on any number of ranks (Wu & He 2018).
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
        for stage, width in enumerate(channels):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers.append(nn.Conv2d(before, width, 3, padding=1, bias=False))
                layers.append(nn.GroupNorm(_num_groups(width), width))
                layers.append(nn.GELU())
                before = width
        self.features = nn.Sequential(*layers)
        # Four quarters, not one mean: where a stroke is tells a 6 from a 9.
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * before, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[batch, channels, height, width] → logits [batch, classes]."""
        pooled = self.pool(self.features(pixel_values))
        return self.classifier(self.dropout(pooled))


def _num_groups(width: int) -> int:
    """The largest number of groups up to 8 that divides `width`."""
    groups = 8
    while width % groups:
        groups -= 1
    return groups
