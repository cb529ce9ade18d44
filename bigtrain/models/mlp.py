"""Fully connected networks, down to the linear model."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear → GELU → dropout, once per entry of `hidden`, then a linear layer."""

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        hidden: tuple[int, ...] = (256, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_features
        for width in hidden:
            layers += [nn.Linear(before, width), nn.GELU(), nn.Dropout(dropout)]
            before = width
        layers.append(nn.Linear(before, num_outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
        """[batch, features], or images that are flattened → [batch, outputs]."""
        inputs = pixel_values if features is None else features
        assert inputs is not None
        return self.layers(inputs.flatten(1))


class Linear(MLP):
    """Linear or logistic regression: the loss decides which."""

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__(in_features, num_outputs, hidden=())
