"""Tasks over sequences of target tokens: language modelling and sequence to sequence."""

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.aggregation import MeanMetric

from bigtrain.data.examples import Example
from bigtrain.tasks.base import IGNORED, Batch, Evaluator, Task


class _TokenTask(Task):
    """Cross entropy over target tokens; a position labelled IGNORED weighs nothing."""

    unit, shape = "tokens", "[batch, target length, vocabulary]"

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

    def evaluator(self, device: torch.device) -> "LanguageEvaluator":
        return LanguageEvaluator(self, device, self.corpus.eval_bytes)


class Seq2Seq(_TokenTask):
    """Write the target sequence given the source."""

    def collate(self, examples: list[Example]) -> Batch:
        """source, target token ids → encoder inputs, decoder inputs (the target shifted right) and labels."""
        padding = self.corpus.tokenizer.pad_token_id or 0
        sources = [torch.from_numpy(example["source"]) for example in examples]
        targets = [torch.from_numpy(example["target"]) for example in examples]
        start = torch.tensor([padding])  # as T5 does; the model's config is given the same
        decoder = [torch.cat([start, target[:-1]]) for target in targets]
        inputs = pad_sequence(sources, batch_first=True, padding_value=padding)
        return {
            "input_ids": inputs,
            "attention_mask": pad_sequence([torch.ones_like(s) for s in sources], batch_first=True),
            "decoder_input_ids": pad_sequence(decoder, batch_first=True, padding_value=padding),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        }

    def evaluator(self, device: torch.device) -> "LanguageEvaluator":
        return LanguageEvaluator(self, device, None)


class LanguageEvaluator(Evaluator):
    """loss (nats per target token) and perplexity; bits per byte of text; or the share of exact sequences."""

    def __init__(self, task: _TokenTask, device: torch.device, text_bytes: int | None) -> None:
        super().__init__(task, device)
        self.text_bytes = text_bytes
        self.exact = MeanMetric(nan_strategy="disable").to(device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        # All target tokens likeliest, given the target before them: then greedy decoding, which meets the same
        # prefixes, writes exactly the target; and the reverse. So no decoding is needed to count exact matches.
        right = (logits.argmax(-1) == labels) | (labels == IGNORED)
        self.exact.update(right.all(-1).float())

    def metrics(self, loss: float) -> dict[str, float]:
        perplexity = {"perplexity": math.exp(min(loss, 700.0))}
        if self.text_bytes is None:
            return perplexity | {"exact_match": float(self.exact.compute())}
        return perplexity | {"bits_per_byte": float(self.total.compute()) / math.log(2) / self.text_bytes}
