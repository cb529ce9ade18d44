"""Tasks over sequences of target tokens: language modelling and sequence to sequence."""

import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.aggregation import MeanMetric

from bigtrain.data.examples import Batch, Example
from bigtrain.tasks.base import IGNORED, SAMPLES, Evaluator, Task, outputs

_WRITTEN = 24  # tokens of a sample, at most


def generate_tokens(
    model: Any, batch: Batch, key: str, start: int, choose: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Write into `batch[key]` [batch, length] from position `start` on; yields each place's tokens [batch].

    `choose` takes logits [batch, vocabulary] to tokens [batch]. Endless: beyond `length` the last logits are
    chosen from again. One forward pass for each place, all of one shape.
    """
    ids = batch[key].clone()
    length = ids.shape[1]
    for place in count(start):
        logits = outputs(model, **(batch | {key: ids}))
        tokens = choose(logits[:, min(place, length) - 1])
        if place < length:
            ids[:, place] = tokens
        yield tokens


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


class LanguageEvaluator(Evaluator):
    """loss (nats per target token) and perplexity; bits per byte of text; or the share of exact sequences."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task, device)
        self.exact = MeanMetric(nan_strategy="disable").to(device)

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        """`logits` [batch, length, vocabulary], `labels` [batch, length].

        If every target token is the likeliest, given the target tokens before it, then greedy decoding, which
        meets the same prefixes, writes exactly the target; and the reverse. So exact matches need no decoding.
        """
        is_right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        self.exact.update(is_right.all(-1).float())

    def samples(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """What the model writes by itself: after the first half of some texts, or for some sources.

        The number of forward passes does not depend on the batch: where weights are sharded all ranks run
        them together.
        """
        few = {name: tensor[:SAMPLES] for name, tensor in batch.items()}
        labels = few.pop("labels")
        if self.task.spec.is_packed:
            return self._continue_text(model, few, labels)
        return self._answer_source(model, few, labels)

    def _continue_text(self, model: Any, inputs: Batch, labels: Tensor) -> list[dict[str, Any]]:
        half = max(1, (self.task.data.seq_len or 0) // 2)
        written = _write(model, inputs, "input_ids", half)
        # The label of a position is the token after it.
        return self._rows(inputs["input_ids"][:, :half], written, labels[:, half - 1 :])

    def _answer_source(self, model: Any, inputs: Batch, labels: Tensor) -> list[dict[str, Any]]:
        written = _write(model, inputs, "decoder_input_ids", 1)
        return self._rows(inputs["input_ids"], written, labels)

    def _rows(self, given: Tensor, written: Tensor, true: Tensor) -> list[dict[str, Any]]:
        """Token ids [batch, any length] each → a row of texts for each example."""
        given_texts = self.task.data.tokenizer.batch_decode(given, skip_special_tokens=True)
        written_texts = self._decode_until_end(written)
        true_texts = self._decode_until_end(true[:, :_WRITTEN])
        rows = []
        for index, text in enumerate(given_texts):
            row = {"given": text, "written": written_texts[index], "true": true_texts[index]}
            rows.append(row)
        return rows

    def _decode_until_end(self, ids: Tensor) -> list[str]:
        """Texts of `ids` [batch, length] up to the end-of-text token or to what is ignored."""
        tokenizer = self.task.data.tokenizer
        end = tokenizer.eos_token_id
        is_end = (ids == end) | (ids == IGNORED)
        is_over = is_end.cumsum(1) > 0
        return tokenizer.batch_decode(ids.masked_fill(is_over, end), skip_special_tokens=True)

    def metrics(self, loss: float) -> dict[str, float]:
        metrics = {"perplexity": math.exp(min(loss, 700.0))}  # larger would overflow
        num_bytes = self.task.data.eval_bytes
        if num_bytes is None:
            metrics["exact_match"] = float(self.exact.compute())
        else:
            bits = float(self.total.compute()) / math.log(2)
            metrics["bits_per_byte"] = bits / num_bytes
        return metrics


def _write(model: Any, inputs: Batch, key: str, start: int) -> Tensor:
    """The likeliest tokens [batch, …] for the places of `inputs[key]` from `start` on, some of them at most."""
    tokens = islice(generate_tokens(model, inputs, key, start, _likeliest), _WRITTEN)
    places = max(inputs[key].shape[1] - start, 0)
    return torch.stack(list(tokens), dim=1)[:, :places]


class _TokenTask(Task):
    """Cross entropy over target tokens; a position labelled IGNORED counts nothing."""

    logits_shape = "[batch, target length, vocabulary]"
    evaluator_class = LanguageEvaluator

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def expected_shape(self, logits: Tensor, labels: Tensor) -> tuple[int, ...]:
        return (*labels.shape, logits.shape[-1])


class CausalLM(_TokenTask):
    """Predict each token of a packed text from those before it."""

    def collate(self, examples: list[Example]) -> Batch:
        """`tokens` [length + 1] each → input_ids and labels [batch, length].

        Short windows are padded on the right, where a causal model cannot see the padding.
        """
        tokens = [torch.from_numpy(example["tokens"]) for example in examples]
        inputs = [window[:-1] for window in tokens]
        labels = [window[1:] for window in tokens]
        padding = self.data.tokenizer.pad_token_id or 0
        return {
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=padding),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


class Seq2Seq(_TokenTask):
    """Write the target sequence given the source."""

    def collate(self, examples: list[Example]) -> Batch:
        """`source`, `target` token ids → input_ids, attention_mask [batch, source length] and
        decoder_input_ids (the target shifted right), labels [batch, target length]."""
        targets = [torch.from_numpy(example["target"]) for example in examples]
        padding = self.data.tokenizer.pad_token_id or 0
        start = torch.tensor([padding])  # as T5 does; the model's config is given the same
        shifted = [torch.cat([start, target[:-1]]) for target in targets]
        batch = self.pad(example["source"] for example in examples)
        batch["decoder_input_ids"] = pad_sequence(shifted, batch_first=True, padding_value=padding)
        batch["labels"] = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        return batch
