"""A recurrent network without packed sequences, for exporters, which cannot follow them."""

from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.models.rnn import RNN

_TENSORS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class UnpackedRNN(nn.Module):
    """The states of an RNN's layers over padded sequences, in plain operations.

    Backwards, each sequence is turned round within its own length.
    """

    def __init__(self, rnn: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.directions = 2 if rnn.bidirectional else 1
        cells: list[nn.Module] = []
        for layer in range(rnn.num_layers):
            for suffix in ("", "_reverse")[: self.directions]:
                cells.append(_one_direction(rnn, layer, suffix))
        self.cells = nn.ModuleList(cells)

    def forward(self, sequence: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What RNN._run returns, for [batch, length, width] and a mask [batch, length]."""
        batch, length, _ = sequence.shape
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.int64, device=sequence.device)
        lengths = mask.sum(1, keepdim=True)
        places = torch.arange(length, device=sequence.device).unsqueeze(0)
        turned = (lengths - 1 - places).clamp(min=0)
        states, last = sequence, sequence[:, 0]
        for first in range(0, len(self.cells), self.directions):
            outputs = []
            for direction in range(self.directions):
                inputs = _take(states, turned) if direction else states
                output, _ = self.cells[first + direction](inputs)
                outputs.append(output)
            last = torch.cat([_take(output, lengths - 1)[:, 0] for output in outputs], dim=-1)
            if self.directions == 2:
                outputs[1] = _take(outputs[1], turned)
            states = torch.cat(outputs, dim=-1)
        return states, last


def _one_direction(rnn: nn.LSTM | nn.GRU, layer: int, suffix: str) -> nn.Module:
    directions = 2 if rnn.bidirectional else 1
    width = rnn.input_size if layer == 0 else directions * rnn.hidden_size
    cell = type(rnn)(width, rnn.hidden_size, batch_first=True)
    for name in _TENSORS:
        setattr(cell, f"{name}_l0", getattr(rnn, f"{name}_l{layer}{suffix}"))
    return cell


def _take(states: Tensor, places: Tensor) -> Tensor:
    """[batch, length, width] at `places` [batch, any length]."""
    return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def without_packing(model: nn.Module) -> None:
    """Let an RNN of ours run without packed sequences from now on; others stay as they are."""
    if isinstance(model, RNN):
        unpacked: Any = UnpackedRNN(model.rnn)
        model.unpacked = unpacked
        model._run = unpacked.forward  # type: ignore[method-assign]
