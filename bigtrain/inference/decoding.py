"""Token by token from a model to texts: how tokens are chosen, and where a text ends."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.data.examples import Batch
from bigtrain.tasks.base import model_inputs, outputs

Show = Callable[[str], None]  # gets a text piece by piece
_TOP_K = 50  # the likeliest tokens that are drawn from
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


@dataclass(frozen=True)
class Decoding:
    """How texts are written."""

    tokens: int  # at most
    temperature: float  # 0 takes the likeliest token
    top_p: float = 1.0  # drawn from: the likeliest tokens that together have this probability
    stops: tuple[str, ...] = ()  # texts that end the writing and are not part of it


class TextWriter:
    """One text as its tokens come: where it ends, and what of it can be shown already."""

    def __init__(
        self, tokenizer: Any, decoding: Decoding, ends: set[int], show: Show | None = None
    ) -> None:
        """`ends`: the tokens that end a text."""
        self.text = ""
        self.is_over = False
        self._tokenizer = tokenizer
        self._decoding = decoding
        self._ends = ends
        self._show = show
        self._tokens: list[int] = []
        self._shown = 0  # characters
        # Tokens up to `_read` are in `text`. Those from `_context` on are decoded with new ones,
        # because what a token says may depend on those before it.
        self._context = 0
        self._read = 0

    def add(self, token: int) -> None:
        """Take the next token; it counts for nothing if the text is over."""
        if self.is_over:
            return
        if token in self._ends:
            self.finish()
            return
        self._tokens.append(token)
        if self._show is not None or self._decoding.stops:
            self._read_tokens()
            self._look_for_stop()
            self._show_until(len(self.text) - self._held_back())
        if len(self._tokens) >= self._decoding.tokens:
            self.finish()

    def finish(self) -> None:
        """End the text here."""
        if self.is_over:
            return
        self.is_over = True
        self.text = self._decode(0, len(self._tokens))
        self._look_for_stop()
        self._show_until(len(self.text))

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True))

    def _read_tokens(self) -> None:
        """Add to the text what the new tokens say, once their last character is whole."""
        before = self._decode(self._context, self._read)
        after = self._decode(self._context, len(self._tokens))
        if after.endswith(_UNFINISHED):
            return
        self.text += after[len(before) :]
        self._context = self._read
        self._read = len(self._tokens)

    def _look_for_stop(self) -> None:
        places = [self.text.find(stop) for stop in self._decoding.stops]
        found = [place for place in places if place >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_over = True

    def _held_back(self) -> int:
        """Characters at the text's end that may be the beginning of a stop text."""
        longest = 0
        if self.is_over:
            return 0
        for stop in self._decoding.stops:
            for length in range(1, len(stop)):
                if self.text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest

    def _show_until(self, place: int) -> None:
        if self._show is not None and place > self._shown:
            self._show(self.text[self._shown : place])
            self._shown = place


def write_batch(
    model: Any, batch: Batch, tokenizer: Any, decoding: Decoding, show: Show | None = None
) -> list[str]:
    """What the model writes after each of `input_ids` [batch, length], or as an answer to it.

    `attention_mask` [batch, length] says what is padding: on the left for transformers' decoders,
    else on the right. An encoder-decoder's batch has `decoder_input_ids` [batch, 1] too. Labels are
    not looked at. `show` gets the text of a batch of one while it is written.
    """
    ends = {tokenizer.eos_token_id}
    generation: Any = getattr(model, "generation_config", None)
    end = getattr(generation, "eos_token_id", None)
    if end is not None:
        ends |= set(end) if isinstance(end, list) else {end}
    size = len(batch["input_ids"])
    writers = [TextWriter(tokenizer, decoding, ends, show) for _ in range(size)]
    with torch.inference_mode():
        if hasattr(model, "generate"):
            _write_by_transformers(model, batch, tokenizer, decoding, writers)
        else:
            _write_by_forward_passes(model, batch, decoding, writers)
    for writer in writers:
        writer.finish()
    return [writer.text for writer in writers]


def _take(writers: list[TextWriter], tokens: Tensor) -> Tensor:
    """Give each writer its token of `tokens` [batch]; which of them are over: bool [batch]."""
    for writer, token in zip(writers, tokens.tolist(), strict=True):
        writer.add(token)
    return torch.tensor([writer.is_over for writer in writers], device=tokens.device)


def _write_by_transformers(
    model: Any, batch: Batch, tokenizer: Any, decoding: Decoding, writers: list[TextWriter]
) -> None:
    """By transformers' own generation, which keeps what it has computed of earlier tokens."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Written(StoppingCriteria):
        """Called after each token of all texts."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return _take(writers, input_ids[:, -1])

    options: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": decoding.temperature,
            "top_k": _TOP_K,
            "top_p": decoding.top_p,
        }
    padding = tokenizer.pad_token_id
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = padding or 0  # as in training
    model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=decoding.tokens,
        num_beams=1,  # whatever a pretrained model's own configuration says
        pad_token_id=tokenizer.eos_token_id if padding is None else padding,
        stopping_criteria=StoppingCriteriaList([Written()]),
        **options,
    )


def _write_by_forward_passes(
    model: nn.Module, batch: Batch, decoding: Decoding, writers: list[TextWriter]
) -> None:
    """By a model that only has a forward pass, and whose texts are padded on the right.

    Each text's next token comes into its own next place, so that padding is never before a token.
    """
    inputs = model_inputs(batch)
    key = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    ids = inputs[key].clone()
    lengths = torch.full((len(ids),), 1, device=ids.device)
    if key == "input_ids":
        lengths = inputs.pop("attention_mask").sum(1)
    rows = torch.arange(len(ids), device=ids.device)
    choose = partial(_choose, decoding)
    for _ in range(decoding.tokens):
        logits = outputs(model, **(inputs | {key: ids}))
        tokens = choose(logits[rows, lengths - 1])
        if bool(_take(writers, tokens).all()):
            return
        if int(lengths.max()) == ids.shape[1]:
            ids = nn.functional.pad(ids, (0, 1))
        ids[rows, lengths] = tokens
        lengths = lengths + 1


def _choose(decoding: Decoding, logits: Tensor) -> Tensor:
    """From logits [batch, vocabulary] to tokens [batch]."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    best = torch.topk(logits / decoding.temperature, min(_TOP_K, logits.shape[-1]))
    probabilities = best.values.softmax(-1)
    if decoding.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # of the likelier tokens together
        is_drawn = before < decoding.top_p
        is_drawn[:, 0] = True
        probabilities = probabilities * is_drawn
    drawn = torch.multinomial(probabilities, 1)
    return best.indices.gather(-1, drawn)[:, 0]
