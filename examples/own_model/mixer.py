"""A small ConvMixer (Trockman and Kolter 2022): a class that knows nothing of bigtrain."""

import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """Patches of an image, mixed by turns within each channel and across the channels."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, kernel_size=2, stride=2)
        self.space = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(depth)
        )
        self.channels = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))
        self.head = nn.Linear(width, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[batch, channels, height, width] → logits [batch, classes]."""
        x = self.patches(pixel_values)
        for space, channels in zip(self.space, self.channels, strict=True):
            x = F.gelu(channels(x + F.gelu(space(x))))
        return self.head(x.mean((2, 3)))
