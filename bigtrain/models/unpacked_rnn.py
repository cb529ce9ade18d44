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
        suffixes = ["", "_reverse"] if rnn.bidirectional else [""]
        self.directions = len(suffixes)
        self.cells = nn.ModuleList()
        for layer in range(rnn.num_layers):
            for suffix in suffixes:
                cell = _one_direction(rnn, layer, suffix)
                self.cells.append(cell)

    def forward(self, sequence: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What RNN._run returns, for [batch, length, width] and a mask [batch, length]."""
        if mask is None:
            mask = torch.ones_like(sequence[..., 0], dtype=torch.int64)
        lengths = mask.sum(1, keepdim=True)
        places = torch.arange(mask.shape[1], device=mask.device)
        turned = (lengths - 1 - places).clamp(min=0)
        states = sequence
        final = sequence[:, 0]
        for first in range(0, len(self.cells), self.directions):
            output, _ = self.cells[first](states)
            last = _take(output, lengths - 1)
            if self.directions == 2:
                backwards, _ = self.cells[first + 1](_take(states, turned))
                last_backwards = _take(backwards, lengths - 1)
                last = torch.cat([last, last_backwards], dim=-1)
                output = torch.cat([output, _take(backwards, turned)], dim=-1)
            states = output
            final = last[:, 0]
        return states, final


def _one_direction(rnn: nn.LSTM | nn.GRU, layer: int, suffix: str) -> nn.Module:
    """One layer in one direction, with the same weights."""
    width = rnn.input_size
    if layer > 0:
        width = rnn.hidden_size
        if rnn.bidirectional:
            width *= 2
    cell = type(rnn)(
        width,
        rnn.hidden_size,
        batch_first=True,
    )
    for name in _TENSORS:
        tensor = getattr(rnn, f"{name}_l{layer}{suffix}")
        setattr(cell, f"{name}_l0", tensor)
    return cell


def _take(states: Tensor, places: Tensor) -> Tensor:
    """[batch, length, width] at `places` [batch, any length]."""
    width = states.shape[-1]
    everywhere = places.unsqueeze(-1).expand(-1, -1, width)
    return states.gather(1, everywhere)


def without_packing(model: nn.Module) -> None:
    """Let an RNN of ours run without packed sequences from now on; others stay as they are."""
    if isinstance(model, RNN):
        unpacked: Any = UnpackedRNN(model.rnn)
        model.unpacked = unpacked
        model._run = unpacked.forward  # type: ignore[method-assign]
