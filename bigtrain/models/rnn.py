"""Recurrent networks: a language model and a classifier of texts or of images read row by row."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Attention(nn.Module):
    """A mean of states, weighted by how much each of them matters (Bahdanau et al. 2015).

    weight = softmax(v · tanh(W state)) over the states of a sequence.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """`states` [batch, length, width] → [batch, width]; where `mask` is 0 there is padding."""
        scores = self.score(torch.tanh(self.hidden(states)))
        if mask is not None:
            scores = scores.masked_fill(mask[..., None] == 0, -torch.inf)
        return (scores.softmax(1) * states).sum(1)


class RNN(nn.Module):
    """An LSTM or GRU over tokens (`vocab_size`) or rows of pixels (`row_width`).

    Logits at every position (`per_position`: a language model) or one per sequence.
    """

    def __init__(
        self,
        num_outputs: int,
        vocab_size: int | None = None,
        row_width: int | None = None,
        per_position: bool = False,
        cell: Literal["lstm", "gru"] = "lstm",
        embed: int = 256,
        hidden: int = 256,
        layers: int = 1,
        bidirectional: bool = False,
        tied: bool = True,
        dropout: float = 0.0,
        attention: bool = False,
    ) -> None:
        """`tied`: a language model's output layer is its embedding (Press & Wolf 2017).

        `attention`: a class is predicted from a weighted mean of all states, not from the last one.
        """
        super().__init__()
        if cell not in _CELLS:
            raise ValueError(f"cell is {cell!r}; expected one of: {', '.join(_CELLS)}")
        if per_position and bidirectional:
            raise ValueError(
                "a language model that reads backwards would see the answer;"
                " expected bidirectional: false"
            )
        if per_position and attention:
            raise ValueError("attention is for classes: it would see the answer")
        self.per_position = per_position
        self.embedding = nn.Embedding(vocab_size, embed) if vocab_size else None
        self.dropout = nn.Dropout(dropout)
        self.rnn = _CELLS[cell](
            embed if vocab_size else row_width,
            hidden,
            layers,
            batch_first=True,
            bidirectional=bidirectional,
            dropout=dropout if layers > 1 else 0.0,  # it is between layers
        )
        width = 2 * hidden if bidirectional else hidden
        if not per_position or self.embedding is None:
            tied = False
        self.attention = Attention(width) if attention else None
        self.project = nn.Linear(width, embed) if tied and width != embed else None
        self.head = nn.Linear(embed if tied else width, num_outputs)
        if tied and self.embedding is not None:
            # 1.0, torch's default, would start a tied output far too sure of itself
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Tokens [batch, length] or images [batch, channels, rows, width] → logits.

        [batch, length, outputs] with `per_position`, else [batch, outputs].
        """
        if self.embedding is not None:
            assert input_ids is not None
            sequence = self.embedding(input_ids)
        else:
            assert pixel_values is not None
            sequence = pixel_values.transpose(1, 2).flatten(2)
        states, last = self._run(self.dropout(sequence), attention_mask)
        if self.attention is not None:
            last = self.attention(states, attention_mask)
        hidden = self.dropout(states if self.per_position else last)
        if self.project is not None:
            hidden = self.project(hidden)
        return self.head(hidden)

    def get_output_embeddings(self) -> nn.Linear | None:
        """The layer that makes a language model's logits, by transformers' name for it."""
        return self.head if self.per_position else None

    def _run(self, sequence: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All states, and the last true one of each sequence (of both directions)."""
        if self.per_position or mask is None:
            states, last = self.rnn(sequence)
        else:
            lengths = mask.sum(1).cpu()
            packed = pack_padded_sequence(sequence, lengths, batch_first=True, enforce_sorted=False)
            states, last = self.rnn(packed)
            if self.attention is not None:
                length = sequence.shape[1]
                states, _ = pad_packed_sequence(states, True, total_length=length)
        final = last[0] if isinstance(last, tuple) else last  # an LSTM has a cell state too
        directions = 2 if self.rnn.bidirectional else 1
        return states, torch.cat(list(final[-directions:]), dim=-1)
