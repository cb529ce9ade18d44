"""Fully connected networks, down to the linear model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear → GELU → dropout, once per entry of `hidden`, then a linear layer.

    The last features may be categories of a table, one-hot, `cardinalities` of them for each
    column: each column is embedded in half as many numbers (50 at most).
    """

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        hidden: tuple[int, ...] = (256, 256),
        dropout: float = 0.0,
        cardinalities: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.sizes = [in_features - sum(cardinalities), *cardinalities]
        # A product with one-hot rows looks its row up. No row, which is nothing, for a value that
        # was never seen in training.
        self.embeddings = nn.ModuleList()
        before = self.sizes[0]
        for count in cardinalities:
            embedding = nn.Linear(count, min(50, (count + 1) // 2), bias=False)
            nn.init.normal_(embedding.weight)
            self.embeddings.append(embedding)
            before += embedding.out_features
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(before, width), nn.GELU(), nn.Dropout(dropout)]
            before = width
        layers.append(nn.Linear(before, num_outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
        """[batch, features], or images that are flattened → [batch, outputs]."""
        inputs = pixel_values if features is None else features
        assert inputs is not None
        inputs = inputs.flatten(1)
        if len(self.embeddings):
            numbers, *categories = inputs.split(self.sizes, dim=1)
            for embedding, one_hot in zip(self.embeddings, categories, strict=True):
                numbers = torch.cat([numbers, embedding(one_hot)], dim=1)
            inputs = numbers
        return self.layers(inputs)


class Linear(MLP):
    """Linear or logistic regression: the loss decides which."""

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__(in_features, num_outputs, hidden=())
