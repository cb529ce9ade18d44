"""Let a trained language model write."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.examples import Batch
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.engine.runtime import find_device
from bigtrain.errors import RequestError
from bigtrain.inference.decoding import Decoding, Show, write_batch
from bigtrain.inference.load import load_placed

_TEMPERATURE = 0.8  # of a language model's writing; an answer is the likeliest one
_TOKENS_PER_BATCH = 16_384  # as the plan has it for a micro-batch


class Generator:
    """An exported model that writes: after a prompt (causal_lm), or for it (seq2seq).

    On a GPU where there is one, in bf16 if it has that; else in fp32 on the CPU.
    """

    def __init__(self, folder: Path) -> None:
        """Load it. Raises RequestError for a model of another task."""
        task = json.loads((folder / "bigtrain.json").read_text())["task"]
        self.spec = TASK_SPECS[task]
        if not self.spec.is_language:
            raise RequestError(
                f"{folder} was trained for task {task}",
                "a causal_lm or seq2seq run",
                "bigtrain predict RUN FILES",
            )
        self.tokenizer = load_tokenizer(str(folder))
        self.device = find_device("auto")
        self.model: Any = load_placed(folder, task, self.device)
        config = getattr(self.model, "config", None)
        self.positions: int | None = getattr(config, "max_position_embeddings", None)

    def decoding(
        self, tokens: int, temperature: float | None, top_p: float, stops: tuple[str, ...]
    ) -> Decoding:
        """The way of writing; without a `temperature` the task's own."""
        if temperature is None:
            temperature = _TEMPERATURE if self.spec.is_packed else 0.0
        if not all(stops):
            raise RequestError("--stop with an empty text", "a text that ends the writing")
        return Decoding(tokens, temperature, top_p, stops)

    def write(self, prompt: str, decoding: Decoding, seed: int, show: Show | None = None) -> str:
        """What the model writes; `show` gets it piece by piece, after the prompt if it goes on.

        Raises RequestError for a prompt that is too long.
        """
        ids = self._encode(prompt, "the prompt")
        if show is not None and self.spec.is_packed:
            show(prompt)
        torch.manual_seed(seed)
        return self._write([ids], decoding, show)[0]

    def write_all(
        self, prompts: list[str], decoding: Decoding, seed: int
    ) -> Iterator[tuple[str, str]]:
        """Each prompt with what the model writes, in order; computed in batches.

        Raises RequestError for a prompt that is too long, before the first is written.
        """
        encoded = [self._encode(text, f"prompt {n}") for n, text in enumerate(prompts)]
        torch.manual_seed(seed)
        done = 0
        for batch in self._batches(encoded, decoding.tokens):
            for text in self._write(batch, decoding, None):
                yield prompts[done], text
                done += 1

    def _encode(self, prompt: str, name: str) -> Tensor:
        """Token ids [length], with the end-of-text token that training had beside them."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        # In training an end-of-text token came before every document, and after every source.
        ids = [end, *ids] if self.spec.is_packed else [*ids, end]
        if self.positions and len(ids) >= self.positions:
            raise RequestError(
                f"{name} has {len(ids)} tokens",
                f"fewer than the model's {self.positions} positions",
            )
        return torch.tensor(ids)

    def _room(self, length: int) -> int | None:
        """Tokens that can be written for a prompt of `length`; None: as many as one likes."""
        if self.positions is None:
            return None
        return self.positions - (length if self.spec.is_packed else 1)

    def _batches(self, encoded: list[Tensor], tokens: int) -> Iterator[list[Tensor]]:
        """Consecutive prompts. One that comes near the model's last position is alone.

        Beside a longer one it would not get all of its tokens.
        """
        longest = max((len(ids) for ids in encoded), default=0)
        size = max(1, _TOKENS_PER_BATCH // (min(longest + tokens, self.positions or 2**62)))
        batch: list[Tensor] = []
        for ids in encoded:
            room = self._room(len(ids))
            is_near_the_end = room is not None and room < tokens
            if batch and (len(batch) == size or is_near_the_end):
                yield batch
                batch = []
            batch.append(ids)
            if is_near_the_end:
                yield batch
                batch = []
        if batch:
            yield batch

    def _write(self, prompts: list[Tensor], decoding: Decoding, show: Show | None) -> list[str]:
        longest = max(len(ids) for ids in prompts)
        room = self._room(longest)
        tokens = decoding.tokens if room is None else min(decoding.tokens, room)
        decoding = Decoding(tokens, decoding.temperature, decoding.top_p, decoding.stops)
        batch = self._padded(prompts)
        batch = {name: tensor.to(self.device.kind) for name, tensor in batch.items()}
        return write_batch(self.model, batch, self.tokenizer, decoding, show)

    def _padded(self, prompts: list[Tensor]) -> Batch:
        """Padded on the left for a decoder of transformers', so that all end where writing begins.

        Else on the right: a model with only a forward pass may not know what padding is.
        """
        on_left = self.spec.is_packed and hasattr(self.model, "generate")
        side = "left" if on_left else "right"
        padding = self.tokenizer.pad_token_id or 0
        masks = [torch.ones_like(ids) for ids in prompts]
        batch = {
            "input_ids": pad_sequence(prompts, True, padding, side),
            "attention_mask": pad_sequence(masks, True, 0, side),
        }
        if not self.spec.is_packed:
            start = torch.full((len(prompts), 1), padding)  # as in training
            batch["decoder_input_ids"] = start
        return batch


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: its lines, or of a jsonl each line's `prompt`.

    Raises RequestError for a file without any, and for a line that has none.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    if not lines[-1]:  # after the last end of line
        lines.pop()
    if not lines:
        raise RequestError(f"{path} is empty", "one prompt in each line")
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        prompts.append(_prompt_of(line, f"{path} line {number}", path.suffix == ".jsonl"))
    return prompts


def _prompt_of(line: str, place: str, is_json: bool) -> str:
    if not is_json:
        return line.removesuffix("\r")
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise RequestError(f"{place} has no prompt", '{"prompt": "…"} in each line')
    return prompt
