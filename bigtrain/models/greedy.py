"""Greedy decoding of encoder-decoders: what a model writes by itself, for metrics of its texts."""

from typing import Any

import torch
from torch import Tensor


def write_targets(
    model: Any, inputs: dict[str, Tensor], tokenizer: Any, length: int, ranks_together: bool
) -> Tensor:
    """The likeliest tokens [batch, at most `length`] for each source, one after another.

    `inputs`: input_ids and attention_mask [batch, source length]. Models of transformers keep the
    keys and values of what they have written. `ranks_together`: go on until all ranks have done,
    because sharded weights are gathered by all of them; other models always make `length` passes.
    """
    padding = tokenizer.pad_token_id or 0  # the decoder begins with it, as in training
    if not hasattr(model, "generate"):
        written = torch.full_like(inputs["input_ids"][:, :1], padding)
        for _ in range(length):
            result = model(**inputs, decoder_input_ids=written)
            logits = getattr(result, "logits", result)
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        return written[:, 1:]
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        use_cache=True,
        decoder_start_token_id=padding,
        pad_token_id=padding,
        eos_token_id=tokenizer.eos_token_id,
    )
    generated: Tensor = model.generate(
        **inputs, generation_config=config, synced_gpus=ranks_together
    )
    return generated[:, 1:]
