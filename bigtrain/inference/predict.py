"""What a trained model makes of texts, images and rows, one result for each input.

Batches begin at fixed inputs, so work that was cut short and goes on gives the same numbers.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from bigtrain.config.recipe import EngineConfig
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.examples import Example, PreparedData
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import Device, find_device, prefer_channels_last
from bigtrain.errors import RequestError
from bigtrain.inference.decoding import Decoding, write_batch
from bigtrain.inference.inputs import Input, Inputs, Unusable, Usable, make_encoder
from bigtrain.inference.load import load_placed, read_about
from bigtrain.tasks.registry import TASKS

Result = dict[str, Any]  # one line of the output
_BATCHES_PER_BLOCK = 8  # of texts, which are sorted by length within a block


@dataclass(frozen=True)
class _Loaded:
    """Inputs of a block as examples."""

    inputs: list[Input]
    encoded: list[Usable | Unusable]


class Predictor:
    """An exported model that predicts."""

    def __init__(self, folder: Path) -> None:
        """Load it. Raises RequestError for a model that writes on without end (causal_lm)."""
        self.about = read_about(folder)
        self.spec = TASK_SPECS[self.about["task"]]
        if self.spec.is_packed:
            raise RequestError(
                f"{folder} is a language model, which goes on writing and predicts no one answer",
                "a model that classifies, answers or gives a number",
                "bigtrain generate RUN --from PROMPTS.txt",
            )
        tokenizer = load_tokenizer(str(folder)) if self.spec.data == "text" else None
        self.encode = make_encoder(self.about, tokenizer)
        self.device: Device = find_device("auto")
        self.model = load_placed(folder, self.about["task"], self.device)
        self.channels_last = prefer_channels_last(self.model, torch.device(self.device.kind))
        torch.backends.cudnn.benchmark = False  # its choices would differ from start to start
        self.prepared = _prepared(self.about, tokenizer)
        self.task = TASKS[self.about["task"]](self.about["task"], self.prepared)

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty for a model that does not classify."""
        return self.prepared.classes

    def batch_size(self, num_inputs: int) -> int:
        """Inputs per forward pass, by the rule that training chooses its micro-batch by."""
        plan, _ = make_plan(
            EngineConfig(global_batch="all"),
            world_size=1,
            samples=num_inputs,
            tokens_per_sample=self.prepared.cost_on(self.device.kind),
            bf16_is_fast=self.device.bf16_is_fast,
        )
        return plan.micro_batch

    def block_size(self, batch_size: int) -> int:
        """Inputs that are read, computed and written together."""
        return batch_size * (_BATCHES_PER_BLOCK if self.spec.data == "text" else 1)

    def blocks(self, inputs: Inputs, batch_size: int, first: int = 0) -> Iterator[list[Result]]:
        """Results in the order of the inputs, from number `first` on (where a block begins).

        While a block is computed, the next one is read.
        """
        size = self.block_size(batch_size)

        def load(start: int) -> _Loaded:
            found = inputs.read(start, start + size)
            return _Loaded(found, self.encode(found))

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(load, first)
            for start in range(first, len(inputs), size):
                block = coming.result()
                coming = reader.submit(load, start + size)
                yield self._predict_block(block, batch_size)

    def _predict_block(self, block: _Loaded, batch_size: int) -> list[Result]:
        usable: dict[int, Usable] = {}
        for number, item in enumerate(block.encoded):
            if isinstance(item, Usable):
                usable[number] = item
        # Texts of like length together: less padding.
        order = sorted(usable, key=lambda number: usable[number].length)
        predictions: dict[int, Result] = {}
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            examples = [usable[number].example for number in numbers]
            predictions |= zip(numbers, self.predict(examples), strict=True)
        results: list[Result] = []
        for number, item in enumerate(block.encoded):
            result: Result = {"file": block.inputs[number].file, "row": block.inputs[number].row}
            if isinstance(item, Unusable):
                result["error"] = item.reason
            else:
                result |= predictions[number]
                if item.is_cut:
                    result["cut"] = True
                if item.unknown:
                    result["unknown"] = ", ".join(item.unknown)
            results.append(result)
        return results

    @torch.inference_mode()
    def predict(self, examples: Sequence[Example]) -> list[Result]:
        """One batch: for each example its `prediction`, and `probabilities` of classes [classes].

        An output that is not finite gives an `error` instead.
        """
        batch = self.task.collate(list(examples))
        batch = {name: tensor.to(self.device.kind) for name, tensor in batch.items()}
        if self.spec.predicts == "text":
            decoding = Decoding(tokens=self.about["seq_len"], temperature=0.0)
            texts = write_batch(self.model, batch, self.prepared.tokenizer, decoding)
            return [{"prediction": text} for text in texts]
        if "pixel_values" in batch and self.channels_last:
            images = batch["pixel_values"]
            batch["pixel_values"] = images.contiguous(memory_format=torch.channels_last)
        logits = self.task.logits(self.model, batch)
        return self._results(logits.cpu())

    def _results(self, logits: Tensor) -> list[Result]:
        rows = logits.flatten(1) if logits.ndim > 1 else logits[:, None]
        finite = rows.isfinite().all(1).tolist()
        if self.classes:
            names = [self.classes[number] for number in rows.argmax(1).tolist()]
            columns = rows.softmax(1).tolist()
        else:
            columns = rows.tolist()
        results: list[Result] = []
        for number, values in enumerate(columns):
            if not finite[number]:
                results.append({"error": "the model's output is not finite"})
            elif self.classes:
                probabilities = {
                    name: float(f"{value:.6g}")
                    for name, value in zip(self.classes, values, strict=True)
                }
                results.append({"prediction": names[number], "probabilities": probabilities})
            else:
                results.append({"prediction": values[0]})
        return results


def _prepared(about: dict[str, Any], tokenizer: Any) -> PreparedData:
    """What training knew of its data, as far as an export tells."""
    image = tuple(about["image"]) if about["image"] else None
    tokens = about["seq_len"] or 1
    if image is not None:
        tokens = image[0] * image[1] * image[2] // 64 + 1
    return PreparedData(
        [],
        [],
        tokens_per_sample=tokens,
        seq_len=about["seq_len"],
        tokenizer=tokenizer,
        classes=about["classes"],
        image=image,
        preprocessing=about,
    )


def model_hash(folder: Path) -> str:
    """Of everything in an export that decides what the model says."""
    whole = blake3()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".safetensors", ".json"):
            whole.update(path.relative_to(folder).as_posix().encode())
            whole.update_mmap(path)
    return whole.hexdigest()
