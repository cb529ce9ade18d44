"""Tokenizers: bytes, trained on the data, or pretrained."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3

from bigtrain.errors import RequestError

PAD, EOS = "<pad>", "<eos>"


def tokenizer_stamp(spec: Any) -> Any:
    """A local tokenizer is known by its content, so that training it again makes a new cache."""
    path = Path(spec, "tokenizer.json") if isinstance(spec, str) else None
    return blake3(path.read_bytes()).hexdigest() if path and path.is_file() else spec


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a folder or the hub. Never runs remote code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as problem:
        raise RequestError(
            f"data.tokenizer: no tokenizer at {name!r} ({type(problem).__name__})",
            "bytes, {train: bpe, vocab_size: N}, a folder with tokenizer.json, or a hub id",
        ) from None


def make_tokenizer(spec: Any, texts: Iterable[str]) -> Any:
    """The tokenizer that `spec` describes; byte-level ones cannot meet a text they do not know."""
    if isinstance(spec, str) and spec != "bytes":
        return load_tokenizer(spec)
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    # Trained on nothing, the vocabulary is the special tokens and the 256 bytes.
    train, size = (False, 0) if spec == "bytes" else (True, spec["vocab_size"])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=train)
    fast.decoder = decoders.ByteLevel()
    fast.train_from_iterator(texts if train else [], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def vocabulary_size(tokenizer: Any) -> int:
    """Ids up to the largest there is: some tokenizers have more of them than entries."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
