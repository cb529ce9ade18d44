"""Tokenizers: bytes, trained on the data, or pretrained."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3

from bigtrain.errors import RequestError

PAD = "<pad>"
EOS = "<eos>"


def tokenizer_stamp(spec: str | dict[str, Any]) -> str | dict[str, Any]:
    """What a cache is keyed by: of a local tokenizer its content, since it may be trained again."""
    if isinstance(spec, str):
        file = Path(spec, "tokenizer.json")
        if file.is_file():
            return blake3(file.read_bytes()).hexdigest()
    return spec


def load_tokenizer(name: str) -> Any:
    """A transformers.PreTrainedTokenizerFast from a folder or the hub. Never runs remote code."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = Path(name, "config.json")
    try:
        if config.is_file() and "architecture" in json.loads(config.read_text()):
            # One of our models, of whose type AutoTokenizer would warn.
            return PreTrainedTokenizerFast.from_pretrained(name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as problem:
        raise RequestError(
            f"data.tokenizer: no tokenizer at {name!r} ({type(problem).__name__})",
            "bytes, {train: bpe, vocab_size: N}, a folder with tokenizer.json, or a hub id",
        ) from None


def make_tokenizer(spec: str | dict[str, Any], texts: Iterable[str]) -> Any:
    """The tokenizer of `spec`: the settings of one to train on `texts`, `bytes`, or a name."""
    if isinstance(spec, dict):
        return _train_byte_level(texts, spec["vocab_size"], use_regex=True)
    if spec == "bytes":
        # Trained on nothing, the vocabulary is the special tokens and the 256 bytes.
        return _train_byte_level([], 0, use_regex=False)
    return load_tokenizer(spec)


def _train_byte_level(texts: Iterable[str], vocab_size: int, use_regex: bool) -> Any:
    """A byte-level BPE tokenizer: it can encode any text, seen in training or not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def vocabulary_size(tokenizer: Any) -> int:
    """Ids up to the largest there is: some tokenizers have more of them than entries."""
    largest = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), largest + 1)
