"""Tasks over sequences of target tokens: language modelling and sequence to sequence."""

import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.aggregation import MeanMetric

from bigtrain.data.examples import Example
from bigtrain.tasks.base import IGNORED, SAMPLES, Batch, Evaluator, Task, outputs

_WRITTEN = 24  # tokens of a sample, at most


def generate_tokens(
    model: Any, batch: Batch, key: str, given: int, choose: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Tokens [batch] for `batch[key]` [batch, length] from position `given` on, one place after another and without end:
    each chosen from the logits [batch, vocabulary] of those before. One forward pass each, and all of one shape."""
    ids = batch[key].clone()
    for place in count(given):
        logits = outputs(model, **batch | {key: ids})
        chosen = choose(logits[:, min(place, ids.shape[1]) - 1])
        if place < ids.shape[1]:
            ids[:, place] = chosen
        yield chosen


class LanguageEvaluator(Evaluator):
    """loss (nats per target token) and perplexity; bits per byte of text; or the share of exact sequences."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task, device)
        self.exact = MeanMetric(nan_strategy="disable").to(device)

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        # All target tokens likeliest, given the target before them: then greedy decoding, which meets the same
        # prefixes, writes exactly the target; and the reverse. So no decoding is needed to count exact matches.
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        self.exact.update(right.all(-1).float())

    def samples(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """What the model writes by itself: after the first half of some texts, or for some sources.

        The number of forward passes does not depend on the batch: where weights are sharded all ranks make them together.
        """
        some = {name: tensor[:SAMPLES] for name, tensor in batch.items()}
        labels, most = (
            some.pop("labels"),
            self.task.data.tokens_per_sample // 2,
        )  # half of data.seq_len
        key, given = (
            ("decoder_input_ids", 1) if "decoder_input_ids" in some else ("input_ids", most)
        )
        chosen = islice(
            generate_tokens(model, some, key, given, lambda logits: logits.argmax(-1)), _WRITTEN
        )
        written = torch.stack([*chosen], dim=1)[:, : max(some[key].shape[1] - given, 0)]
        read, end = self.task.data.tokenizer.batch_decode, self.task.data.tokenizer.eos_token_id
        until_end = lambda ids: ids.masked_fill(
            ((ids == end) | (ids == IGNORED)).cumsum(1) > 0, end
        )  # noqa: E731
        true = labels[:, given - 1 : given - 1 + _WRITTEN]
        given_ids = some["input_ids"][:, : None if given == 1 else given]
        parts = {"given": given_ids, "written": until_end(written), "true": until_end(true)}
        texts = [read(ids, skip_special_tokens=True) for ids in parts.values()]
        return [dict(zip(parts, row, strict=True)) for row in zip(*texts, strict=True)]

    def metrics(self, loss: float) -> dict[str, float]:
        perplexity = {"perplexity": math.exp(min(loss, 700.0))}
        if (size := self.task.data.eval_bytes) is None:
            return perplexity | {"exact_match": float(self.exact.compute())}
        return perplexity | {"bits_per_byte": float(self.total.compute()) / math.log(2) / size}


class _TokenTask(Task):
    """Cross entropy over target tokens; a position labelled IGNORED weighs nothing."""

    unit, shape, evaluation = "tokens", "[batch, target length, vocabulary]", LanguageEvaluator

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def output_shape(self, found: Tensor, labels: Tensor) -> tuple[int, ...]:
        return (*labels.shape, found.shape[-1])


class CausalLM(_TokenTask):
    """Predict each token of a packed text from those before it."""

    def collate(self, examples: list[Example]) -> Batch:
        """tokens [length + 1] each → input_ids and labels [batch, length]; short windows are padded on the right,
        where a causal model cannot see the padding."""
        tokens = [torch.from_numpy(example["tokens"]) for example in examples]
        padding = self.data.tokenizer.pad_token_id or 0
        inputs = pad_sequence([t[:-1] for t in tokens], batch_first=True, padding_value=padding)
        labels = pad_sequence([t[1:] for t in tokens], batch_first=True, padding_value=IGNORED)
        return {"input_ids": inputs, "labels": labels}


class Seq2Seq(_TokenTask):
    """Write the target sequence given the source."""

    def collate(self, examples: list[Example]) -> Batch:
        """source, target token ids → encoder inputs, decoder inputs (the target shifted right) and labels."""
        padding = self.data.tokenizer.pad_token_id or 0
        targets = [torch.from_numpy(example["target"]) for example in examples]
        start = torch.tensor([padding])  # as T5 does; the model's config is given the same
        decoder = [torch.cat([start, target[:-1]]) for target in targets]
        return self.padded(example["source"] for example in examples) | {
            "decoder_input_ids": pad_sequence(decoder, batch_first=True, padding_value=padding),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }
