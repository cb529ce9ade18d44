"""Let a finished language model write."""

import json
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor

from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.errors import RequestError
from bigtrain.models.export import load_exported
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.language import generate_tokens


def generate_text(run: RunDir, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """What the model writes after `prompt` (causal_lm), or for it (seq2seq, greedily).

    `tokens` at most; `temperature` 0 takes the likeliest token each time.
    """
    task = json.loads((run.export / "bigtrain.json").read_text())["task"]
    if task not in ("causal_lm", "seq2seq"):
        raise RequestError(
            f"{run.path} is a {task} model",
            "a causal_lm or seq2seq run",
            f"bigtrain evaluate {run.name}",
        )
    tokenizer = load_tokenizer(str(run.export))
    model = load_exported(run.export, task).eval()
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # Training saw an end-of-text token before every document, and after every source.
    ids = [tokenizer.eos_token_id, *ids] if task == "causal_lm" else [*ids, tokenizer.eos_token_id]
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None) or tokens + len(
        ids
    )
    if len(ids) >= most:
        raise RequestError(
            f"the prompt has {len(ids)} tokens", f"fewer than the model's {most} positions"
        )
    tokens = min(tokens, most - len(ids)) if task == "causal_lm" else tokens
    torch.manual_seed(seed)
    with torch.inference_mode():
        written = _generate(
            model, torch.tensor([ids]), tokens, 0.0 if task == "seq2seq" else temperature, tokenizer
        )
    return str(tokenizer.decode(written, skip_special_tokens=True))


def _generate(
    model: Any, ids: Tensor, tokens: int, temperature: float, tokenizer: Any
) -> list[int]:
    if hasattr(model, "generate"):
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 50}
            if temperature > 0
            else {"do_sample": False}
        )
        mask = torch.ones_like(ids)
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
        start = 0 if model.config.is_encoder_decoder else ids.shape[1]
        return list(found[0, start:].tolist())

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        best = torch.topk(logits / temperature, min(50, logits.shape[-1]))
        return best.indices.gather(-1, torch.multinomial(best.values.softmax(-1), 1))[:, 0]

    room = {"input_ids": torch.nn.functional.pad(ids, (0, tokens))}
    chosen = (
        int(token) for (token,) in generate_tokens(model, room, "input_ids", ids.shape[1], choose)
    )
    return list(takewhile(lambda token: token != tokenizer.eos_token_id, islice(chosen, tokens)))
