"""Let a finished language model write."""

import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.engine.runtime import Device, find_device
from bigtrain.errors import RequestError
from bigtrain.models.export import load_exported
from bigtrain.models.greedy import generate_tokens
from bigtrain.runs.directory import RunDir

_TOP_K = 50  # the likeliest tokens that are drawn from


def generate_text(run: RunDir, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """What the model writes after `prompt` (causal_lm), or for it (seq2seq, greedily).

    On a GPU where there is one, in bf16 if it has that; else in fp32 on the CPU. `tokens` at most;
    `temperature` 0 takes the likeliest token each time. Raises RequestError for a
    run of another task, and for a prompt that is too long.
    """
    task = json.loads((run.export / "bigtrain.json").read_text())["task"]
    spec = TASK_SPECS[task]
    if not spec.is_language:
        raise RequestError(
            f"{run.path} was trained for task {task}",
            "a causal_lm or seq2seq run",
            f"bigtrain evaluate {run.name}",
        )
    tokenizer = load_tokenizer(str(run.export))
    device = find_device("auto")
    model = _placed(load_exported(run.export, task).eval(), device)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if spec.is_packed:
        # In training an end-of-text token came before every document.
        ids = [tokenizer.eos_token_id, *ids]
        if positions:
            tokens = min(tokens, positions - len(ids))
    else:
        ids = [*ids, tokenizer.eos_token_id]
        temperature = 0.0
    if positions and len(ids) >= positions:
        raise RequestError(
            f"the prompt has {len(ids)} tokens", f"fewer than the model's {positions} positions"
        )
    torch.manual_seed(seed)
    input_ids = torch.tensor([ids], device=device.kind)
    with torch.inference_mode():
        if hasattr(model, "generate"):
            written = _generate(model, input_ids, tokens, temperature, tokenizer)
        else:
            written = _generate_own(model, input_ids, tokens, temperature, tokenizer)
    return str(tokenizer.decode(written, skip_special_tokens=True))


def _placed(model: nn.Module, device: Device) -> nn.Module:
    """The model on the device; its weights, not its buffers, in bf16 on a GPU that has it."""
    model = model.to(device.kind)
    if device.kind == "cuda" and device.bf16_is_fast:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def _generate(
    model: Any, input_ids: Tensor, tokens: int, temperature: float, tokenizer: Any
) -> list[int]:
    """The tokens after `input_ids` [1, length], or for them, by transformers' own generation."""
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": _TOP_K}
    is_answer = model.config.is_encoder_decoder
    if is_answer:
        options["decoder_start_token_id"] = tokenizer.pad_token_id or 0  # as in training
    generated = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    start = 0 if is_answer else input_ids.shape[1]
    return list(generated[0, start:].tolist())


def _generate_own(
    model: nn.Module, input_ids: Tensor, tokens: int, temperature: float, tokenizer: Any
) -> list[int]:
    """The tokens after `input_ids` [1, length] by a model that only has a forward pass."""
    length = input_ids.shape[1]
    room = torch.nn.functional.pad(input_ids, (0, tokens))
    chosen = generate_tokens(model, {"input_ids": room}, "input_ids", length, _sampler(temperature))
    written: list[int] = []
    for token in islice(chosen, tokens):
        if int(token) == tokenizer.eos_token_id:
            break
        written.append(int(token))
    return written


def _sampler(temperature: float) -> Callable[[Tensor], Tensor]:
    """From logits [batch, vocabulary] to tokens [batch]."""

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        best = torch.topk(logits / temperature, min(_TOP_K, logits.shape[-1]))
        drawn = torch.multinomial(best.values.softmax(-1), 1)
        return best.indices.gather(-1, drawn)[:, 0]

    return choose
