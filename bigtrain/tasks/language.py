"""Tasks over sequences of target tokens: language modelling and sequence to sequence."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bigtrain.data.examples import Batch, Example
from bigtrain.models.greedy import write_on, write_targets
from bigtrain.models.output_loss import IGNORED, OutputLoss
from bigtrain.tasks.base import SAMPLES, Evaluator, Rows, Task, model_inputs, outputs

_WRITTEN = 24  # tokens of a sample, at most
_MAX_LOSS = 700.0  # its exponential is still a number


class LanguageEvaluator(Evaluator):
    """loss (nats per target token), perplexity, and bits per byte or the share of exact targets."""

    task: "TokenTask"
    bleu: Any = None  # once something was written

    def __init__(self, task: Task, device: torch.device) -> None:
        from torchmetrics.aggregation import MeanMetric

        super().__init__(task, device)
        self.exact = MeanMetric(nan_strategy="disable").to(device)

    def update(self, model: Any, batch: Batch) -> None:
        """Add a batch: its loss, and whether each target is exactly what the model would write.

        If every target token is the likeliest, given the target tokens before it, then greedy
        decoding, which meets the same prefixes, writes exactly the target; and the reverse. So
        exact matches need no decoding.
        """
        labels = batch["labels"]
        loss_sum, likeliest = self.task.loss_and_likeliest(model, batch)
        self.add_loss(loss_sum, batch)
        is_right = likeliest == labels
        is_right |= labels == IGNORED
        self.exact.update(is_right.all(-1).float())

    def write(self, model: Any, batch: Batch, has_samples: bool, ranks_together: bool) -> None:
        """Let the model write a target for each source, for BLEU as sacrebleu has it (13a).

        True targets are as the tokenizer gives them back, and of at most `seq_len` tokens.
        """
        if self.task.spec.is_packed:
            return
        if self.bleu is None:
            from torchmetrics.text import SacreBLEUScore

            exact = SacreBLEUScore().set_dtype(torch.float64)
            self.bleu = exact.to(batch["labels"].device)
        written = write_targets(model, batch, self.task.data, ranks_together)
        if has_samples:
            texts = self._decode_until_end(written)
            true_texts = self._decode_until_end(batch["labels"])
            self.bleu.update(texts, [[text] for text in true_texts])

    def samples(self, model: Any, batch: Batch) -> Rows:
        """What the model writes by itself: after the first half of some texts, or for some sources.

        The number of forward passes does not depend on the batch: where weights are sharded all
        ranks run them together.
        """
        few: Batch = {}
        for name, tensor in batch.items():
            few[name] = tensor[:SAMPLES]
        labels = few.pop("labels")
        if self.task.spec.is_packed:
            return self._continue_text(model, few, labels)
        return self._answer_source(model, few, labels)

    def _continue_text(self, model: Any, inputs: Batch, labels: Tensor) -> Rows:
        seq_len = self.task.data.seq_len or 2
        half = max(1, seq_len // 2)
        written = write_on(model, inputs, "input_ids", half, _WRITTEN)
        given = inputs["input_ids"][:, :half]
        true = labels[:, half - 1 :]  # the label of a position is the token after it
        return self._rows(given, written, true)

    def _answer_source(self, model: Any, inputs: Batch, labels: Tensor) -> Rows:
        written = write_on(model, inputs, "decoder_input_ids", 1, _WRITTEN)
        return self._rows(inputs["input_ids"], written, labels)

    def _rows(self, given: Tensor, written: Tensor, true: Tensor) -> Rows:
        """Token ids [batch, any length] each → for each example a row of texts."""
        tokenizer = self.task.data.tokenizer
        given_texts = tokenizer.batch_decode(given, skip_special_tokens=True)
        written_texts = self._decode_until_end(written)
        true_texts = self._decode_until_end(true[:, :_WRITTEN])
        rows: Rows = []
        for index, text in enumerate(given_texts):
            row = {
                "given": text,
                "written": written_texts[index],
                "true": true_texts[index],
            }
            rows.append(row)
        return rows

    def _decode_until_end(self, ids: Tensor) -> list[str]:
        """Texts of `ids` [batch, length] up to the end-of-text token or to what is ignored."""
        tokenizer = self.task.data.tokenizer
        end = tokenizer.eos_token_id
        is_end = (ids == end) | (ids == IGNORED)
        is_over = is_end.cumsum(1) > 0
        until_end = ids.masked_fill(is_over, end)
        return tokenizer.batch_decode(until_end, skip_special_tokens=True)

    def metrics(self, loss: float) -> dict[str, float]:
        metrics = {"perplexity": math.exp(min(loss, _MAX_LOSS))}
        num_bytes = self.task.data.eval_bytes
        if num_bytes is None:
            metrics["exact_match"] = float(self.exact.compute())
            if self.bleu is not None:
                metrics["bleu"] = 100 * float(self.bleu.compute())
        else:
            nats = float(self.total.compute())
            metrics["bits_per_byte"] = nats / math.log(2) / num_bytes
        return metrics


class TokenTask(Task):
    """Cross entropy over target tokens; a position labelled IGNORED counts nothing."""

    logits_shape = "[batch, target length, vocabulary]"
    evaluator_class = LanguageEvaluator
    output_loss: OutputLoss | None = None  # set where the loss can do without logits

    def use_output_layer(self, layer: nn.Linear, model: Any, batch: Batch) -> bool:
        """Compute the loss within the model's output `layer` from now on, if it is the same loss.

        It is not where the model does more with its layer's result than to return it. Both ways are
        tried on `batch`. Returns whether they agree.
        """
        from_logits = self.loss_sum(model, batch)
        self.output_loss = OutputLoss(layer)
        try:
            in_layer = self.loss_sum(model, batch)
            same = in_layer.ndim == 0 and torch.allclose(in_layer, from_logits, rtol=1e-3)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says of a scalar where it expects logits
            same = False
        if not same:
            self.output_loss = None
        return same

    def loss_sum(self, model: Any, batch: Batch) -> Tensor:
        if self.output_loss is None:
            return super().loss_sum(model, batch)
        return self.output_loss.loss_sum(
            partial(outputs, model, **model_inputs(batch)), batch["labels"], self.label_smoothing
        )

    def loss_and_likeliest(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss, without smoothing, and the likeliest tokens [batch, length]."""
        labels = batch["labels"]
        if self.output_loss is None:
            logits = self.logits(model, batch)
            return self.loss_from_logits(logits, labels), logits.argmax(-1)
        likeliest = torch.empty_like(labels)
        run_model = partial(outputs, model, **model_inputs(batch))
        loss_sum = self.output_loss.loss_sum(run_model, labels, likeliest=likeliest)
        return loss_sum, likeliest

    def num_targets(self, batch: Batch) -> int:
        is_target = batch["labels"] != IGNORED
        return int(is_target.sum())

    def expected_shape(self, logits: Tensor, labels: Tensor) -> tuple[int, ...]:
        vocabulary = logits.shape[-1]
        return (*labels.shape, vocabulary)

    def _pad_inputs(self, ids: list[Tensor]) -> Tensor:
        """[length] each → [batch, length], padded on the right with the tokenizer's padding."""
        padding = self.data.tokenizer.pad_token_id or 0
        return pad_sequence(ids, batch_first=True, padding_value=padding)

    def _pad_labels(self, ids: list[Tensor]) -> Tensor:
        """[length] each → [batch, length], padded on the right with IGNORED."""
        return pad_sequence(ids, batch_first=True, padding_value=IGNORED)


class CausalLM(TokenTask):
    """Predict each token of a packed text from those before it."""

    def collate(self, examples: list[Example]) -> Batch:
        """`tokens` [length + 1] each → input_ids and labels [batch, length].

        Short windows are padded on the right, where a causal model cannot see the padding.
        """
        windows = [torch.from_numpy(example["tokens"]) for example in examples]
        inputs = [window[:-1] for window in windows]
        labels = [window[1:] for window in windows]
        return {"input_ids": self._pad_inputs(inputs), "labels": self._pad_labels(labels)}


class Seq2Seq(TokenTask):
    """Write the target sequence given the source."""

    def collate(self, examples: list[Example]) -> Batch:
        """`source` and `target` token ids → encoder inputs, decoder inputs and labels.

        input_ids and attention_mask [batch, source length]; decoder_input_ids (the target shifted
        right) and labels [batch, target length].
        """
        padding = self.data.tokenizer.pad_token_id or 0
        start = torch.tensor([padding])  # as T5 does; the model's config is given the same
        decoder_inputs: list[Tensor] = []
        labels: list[Tensor] = []
        for example in examples:
            target = torch.from_numpy(example["target"])
            decoder_inputs.append(torch.cat([start, target[:-1]]))
            labels.append(target)
        batch = self.pad(example["source"] for example in examples)
        batch["decoder_input_ids"] = self._pad_inputs(decoder_inputs)
        batch["labels"] = self._pad_labels(labels)
        return batch
