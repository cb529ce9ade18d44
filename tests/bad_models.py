"""Classes that do not fit image classification, each in its own way; and one that does, oddly."""

import os
import time

import torch
from torch import Tensor, nn


class WrongShape(nn.Linear):
    """Returns [batch, 3] where ten classes are asked for."""

    def __init__(self) -> None:
        super().__init__(64, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values.flatten(1))


class WrongArguments(nn.Linear):
    """Takes `x`, and is given `pixel_values`."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


class WrongResult(nn.Linear):
    """Returns a dictionary."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"scores": torch.zeros(1)}


class Unused(nn.Linear):
    """Fits, but has a parameter that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__(64, 10)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values.flatten(1))


class SlowOnRankOne(nn.Linear):
    """Fits; its forward pass takes 20 ms more on rank 1."""

    def __init__(self) -> None:
        super().__init__(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.training and os.environ["RANK"] == "1":
            time.sleep(0.02)
        return super().forward(pixel_values.flatten(1))


class StuckOnRankOne(SlowOnRankOne):
    """Fits; in its third step rank 1 waits for something that never comes."""

    steps = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps == 3 and os.environ["RANK"] == "1":
            time.sleep(3600)
        return super().forward(pixel_values)


class FailsInStepThree(SlowOnRankOne):
    """Fits; in its third step it raises an error."""

    steps = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.steps += self.training
        if self.steps == 3:
            raise RuntimeError("so it is")
        return nn.Linear.forward(self, pixel_values.flatten(1))
