"""Tasks over sequences of target tokens: language modelling and sequence to sequence."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.aggregation import MeanMetric

from bigtrain.data.examples import Example
from bigtrain.tasks.base import IGNORED, SAMPLES, Batch, Evaluator, Task, outputs

_WRITTEN = 24  # tokens of a sample, at most


def write(model: Any, batch: Batch, key: str, given: int, tokens: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """`batch[key]` [batch, length] with `tokens` from position `given` on written anew, as far as they have room: each
    chosen from the logits [batch, vocabulary] of those before. The model sees one shape only, `tokens` times."""
    ids = batch[key].clone()
    for place in range(given, given + tokens):
        logits = outputs(model, **batch | {key: ids})
        if place < ids.shape[1]:
            ids[:, place] = choose(logits[:, place - 1])
    return ids


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
        some = {name: tensor[:SAMPLES] for name, tensor in batch.items() if name != "labels"}
        tokenizer, labels, most = self.task.corpus.tokenizer, batch["labels"][:SAMPLES], self.task.corpus.sample_cost // 2
        key, given = ("decoder_input_ids", 1) if "decoder_input_ids" in some else ("input_ids", most)  # half of data.seq_len
        written = write(model, some, key, given, _WRITTEN, lambda logits: logits.argmax(-1))[:, given : given + _WRITTEN]
        true = labels[:, given - 1 : given - 1 + _WRITTEN].masked_fill(labels[:, given - 1 : given - 1 + _WRITTEN] == IGNORED, 0)
        parts = (some["input_ids"][:, : most if given > 1 else None], written, true)
        texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in parts)
        return [{"given": a, "written": b, "true": c} for a, b, c in zip(*texts, strict=True)]

    def metrics(self, loss: float) -> dict[str, float]:
        perplexity = {"perplexity": math.exp(min(loss, 700.0))}
        if (size := self.task.corpus.eval_bytes) is None:
            return perplexity | {"exact_match": float(self.exact.compute())}
        return perplexity | {"bits_per_byte": float(self.total.compute()) / math.log(2) / size}


class _TokenTask(Task):
    """Cross entropy over target tokens; a position labelled IGNORED weighs nothing."""

    unit, shape, evaluation = "tokens", "[batch, target length, vocabulary]", LanguageEvaluator

    def weight(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def output_shape(self, found: Tensor, labels: Tensor) -> tuple[int, ...]:
        return (*labels.shape, found.shape[-1])


class CausalLM(_TokenTask):
    """Predict each token of a packed text from those before it."""

    def collate(self, examples: list[Example]) -> Batch:
        """tokens [length + 1] each → input_ids and labels [batch, length]; short windows are padded on the right,
        where a causal model cannot see the padding."""
        tokens = [torch.from_numpy(example["tokens"]) for example in examples]
        padding = self.corpus.tokenizer.pad_token_id or 0
        inputs = pad_sequence([t[:-1] for t in tokens], batch_first=True, padding_value=padding)
        labels = pad_sequence([t[1:] for t in tokens], batch_first=True, padding_value=IGNORED)
        return {"input_ids": inputs, "labels": labels}


class Seq2Seq(_TokenTask):
    """Write the target sequence given the source."""

    def collate(self, examples: list[Example]) -> Batch:
        """source, target token ids → encoder inputs, decoder inputs (the target shifted right) and labels."""
        padding = self.corpus.tokenizer.pad_token_id or 0
        targets = [torch.from_numpy(example["target"]) for example in examples]
        start = torch.tensor([padding])  # as T5 does; the model's config is given the same
        decoder = [torch.cat([start, target[:-1]]) for target in targets]
        return self.padded(example["source"] for example in examples) | {
            "decoder_input_ids": pad_sequence(decoder, batch_first=True, padding_value=padding),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }
