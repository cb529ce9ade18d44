"""What a language model writes by itself, the likeliest token each time."""

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from bigtrain.data.examples import Batch, PreparedData


def generate_tokens(
    model: Any,
    batch: Batch,
    key: str,
    start: int,
    choose: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Write after the first `start` tokens of `batch[key]` [batch, length]; yields tokens [batch].

    `choose` takes logits [batch, vocabulary] to tokens [batch]. Endless: beyond `length` the last
    logits are chosen from again. One forward pass for each place, all of one shape.
    """
    ids = batch[key].clone()
    length = ids.shape[1]
    inputs = batch | {key: ids}
    for place in count(start):
        logits = _logits(model(**inputs))
        last = min(place, length) - 1
        tokens = choose(logits[:, last])
        if place < length:
            ids[:, place] = tokens
        yield tokens


def _logits(result: Any) -> Tensor:
    """[batch, length, vocabulary] in fp32, of a model of transformers or of a user."""
    logits: Tensor = getattr(result, "logits", result)
    return logits.float()


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def write_on(model: Any, inputs: Batch, key: str, start: int, limit: int) -> Tensor:
    """The likeliest tokens [batch, …] after the first `start` of `inputs[key]`, at most `limit`.

    The number of forward passes does not depend on the batch.
    """
    tokens = generate_tokens(model, inputs, key, start, _likeliest)
    first_tokens = list(islice(tokens, limit))
    written = torch.stack(first_tokens, dim=1)
    places = inputs[key].shape[1] - start
    return written[:, : max(places, 0)]


def write_targets(model: Any, batch: Batch, data: PreparedData, ranks_together: bool) -> Tensor:
    """A target [batch, at most `seq_len`] for each source of `batch`, its end-of-text included.

    Models of transformers keep the keys and values of what they have written. `ranks_together`: go
    on until all ranks have done, because sharded weights are gathered by all of them; other models
    always make `seq_len` passes.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    padding = data.tokenizer.pad_token_id or 0  # the decoder begins with it, as in training
    length = data.seq_len or 1
    if not hasattr(model, "generate"):
        written = torch.full_like(inputs["input_ids"][:, :1], padding)
        for _ in range(length):
            logits = _logits(model(**inputs, decoder_input_ids=written))
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        return written[:, 1:]
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        use_cache=True,
        decoder_start_token_id=padding,
        pad_token_id=padding,
        eos_token_id=data.tokenizer.eos_token_id,
    )
    generated: Tensor = model.generate(
        **inputs, generation_config=config, synced_gpus=ranks_together
    )
    return generated[:, 1:]
