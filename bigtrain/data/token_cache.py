"""Text to token ids, once: a memory-mapped cache keyed by everything it was made from.

Whoever takes the lock builds; other ranks (and other runs) wait for it and map the same pages.
"""

import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from bigtrain.config.recipe import Recipe, TokenizerConfig
from bigtrain.data.held_out import held_out, refuse_empty
from bigtrain.data.records import FIELDS, Record, Source
from bigtrain.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stamp, vocabulary_size
from bigtrain.errors import RequestError

_VERSION = 2  # of the cache's format and of how text becomes ids


class Ragged:
    """Sequences of ids of different lengths: one flat file of ids and one of ends, both memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.ends: NDArray[np.int64] = np.load(
            path.with_suffix(".ends.npy"), mmap_mode="r", allow_pickle=False
        )
        dtype = np.dtype(path.with_suffix(".dtype").read_text())
        size = int(self.ends[-1]) if len(self.ends) else 0
        flat = path.with_suffix(".bin")
        self.flat: NDArray[Any] = (
            np.memmap(flat, dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        start = int(self.ends[index - 1]) if index else 0
        return self.flat[start : int(self.ends[index])].astype(np.int64)


class _RaggedWriter:
    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self.lengths = path, []  # type: tuple[Path, list[int]]
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.file = path.with_suffix(".bin").open("wb")

    def add(self, ids: list[int]) -> None:
        self.file.write(np.asarray(ids, self.dtype).tobytes())
        self.lengths.append(len(ids))

    def close(self) -> None:
        self.file.close()
        np.save(self.path.with_suffix(".ends.npy"), np.cumsum(self.lengths, dtype=np.int64))
        self.path.with_suffix(".dtype").write_text(self.dtype.name)


@dataclass(frozen=True)
class TokenCache:
    """An opened cache: the tokenizer, and per part ("train", "eval") its fields as Ragged or labels."""

    folder: Path
    meta: dict[str, Any]
    tokenizer: Any  # transformers.PreTrainedTokenizerFast

    def field(self, part: str, name: str) -> Ragged:
        return Ragged(self.folder / f"{part}-{name}")

    def labels(self, part: str) -> NDArray[np.int64]:
        return np.load(self.folder / f"{part}-label.npy", allow_pickle=False)


def open_cache(recipe: Recipe, source: Source, evaluation: Source | None) -> TokenCache:
    """The token cache for this data, built now if it is not there yet."""
    task, data = recipe.task, recipe.data
    tokenizer = data.tokenizer if data.tokenizer != "auto" else recipe.model.pretrained or "bytes"
    spec = tokenizer.model_dump() if isinstance(tokenizer, TokenizerConfig) else tokenizer
    # A pretrained tokenizer adds its special tokens and cuts; then the length is part of what the ids are.
    held = evaluation.identity if evaluation else data.eval_fraction
    made_from = [_VERSION, task, source.identity, held, tokenizer_stamp(spec), data.columns]
    if task != "causal_lm":
        made_from.append(data.seq_len)
    root = Path(os.environ.get("BIGTRAIN_CACHE") or Path.home() / ".cache" / "bigtrain")
    folder = root / "tokens" / blake3(json.dumps(made_from).encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "meta.json").is_file():
            building = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                _build(building, recipe, spec, source, evaluation)
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    return TokenCache(folder, meta, load_tokenizer(str(folder / "tokenizer")))


def _build(
    folder: Path, recipe: Recipe, spec: Any, source: Source, evaluation: Source | None
) -> None:
    task, first, note = recipe.task, FIELDS[recipe.task][0], Console(stderr=True)
    bad: set[str] = set()

    def parts() -> Iterator[tuple[str, Record]]:
        for part, origin in (("train", source), ("eval", evaluation)):
            for index, record in enumerate(origin.records() if origin else []):
                if problem := _bad_text(record, task):
                    bad.add(f"record {index} of data.{part}: {problem}")
                    continue
                held = part == "eval" or (
                    evaluation is None and held_out(record, index, first, recipe.data.eval_fraction)
                )
                yield ("eval" if held else "train"), record

    fields = [field for field in FIELDS[task] if field != "label"]
    training_texts = (
        record[field] for part, record in parts() if part == "train" for field in fields
    )
    if isinstance(spec, dict):
        note.print(f"training a {spec['train']} tokenizer of {spec['vocab_size']:,} entries")
    tokenizer = make_tokenizer(spec, training_texts)
    if tokenizer.eos_token_id is None and task != "text_classification":
        raise RequestError(
            f"data.tokenizer: {spec} has no end-of-text token", "a tokenizer with eos_token"
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    meta = _encode(folder, recipe, tokenizer, parts(), fields, note)
    refuse_empty(meta["records"], bad)
    (folder / "meta.json").write_text(json.dumps(meta | {"bad": sorted(bad)}))


def _bad_text(record: Record, task: str) -> str:
    """What is wrong with a record; empty: nothing."""
    wrong = (
        f
        for f in FIELDS[task]
        if record[f] is None or (f != "label" and not isinstance(record[f], str))
    )
    return next((f"{field} is {type(record[field]).__name__}, not text" for field in wrong), "")


def _encode(
    folder: Path,
    recipe: Recipe,
    tokenizer: Any,
    parts: Iterator[tuple[str, Record]],
    fields: list[str],
    note: Console,
) -> dict[str, Any]:
    """Write every record's ids; returns what is known of them."""
    task, most, eos = recipe.task, recipe.data.seq_len, tokenizer.eos_token_id
    labels: dict[str, list[str]] = {"train": [], "eval": []}
    writers = {
        (part, f): _RaggedWriter(folder / f"{part}-{f}", vocabulary_size(tokenizer))
        for part in labels
        for f in fields
    }
    cut, text = 0, _TextStatistics()
    batches = iter(lambda: list(islice(parts, 64)), [])
    for batch in track(
        batches, "tokenising", console=note, transient=True, disable=not sys.stderr.isatty()
    ):
        for field in fields:
            texts = [record[field] for _, record in batch]
            # The Rust tokenizer works on all cores within a batch.
            encoded = tokenizer(
                texts, add_special_tokens=task != "causal_lm", return_attention_mask=False
            )["input_ids"]
            for (part, record), ids in zip(batch, encoded, strict=True):
                cut += task != "causal_lm" and len(ids) > most
                writers[part, field].add(
                    [*ids, eos] if task == "causal_lm" else _fit(ids, most, eos, field != "text")
                )
                if part == "eval" and task == "causal_lm":
                    text.add(record[field])
        if "label" in FIELDS[task]:
            for part, record in batch:
                labels[part].append(str(record["label"]))
    for writer in writers.values():
        writer.close()
    classes = sorted(set(chain(*labels.values())))
    numbers = {name: number for number, name in enumerate(classes)}
    for part, names in labels.items():
        np.save(
            folder / f"{part}-label.npy", np.asarray([numbers[name] for name in names], np.int64)
        )
    records = {part: len(writers[part, fields[0]].lengths) for part in labels}
    return {
        "records": records,
        "classes": classes,
        "cut": cut,
        "vocab_size": vocabulary_size(tokenizer),
        **text.summary(),
    }


def _fit(ids: list[int], most: int, eos: int | None, ends: bool) -> list[int]:
    """At most `most` ids; with `ends` the last one is the end-of-text token."""
    if not ids or (ends and ids[-1] != eos):
        ids.append(eos or 0)  # an empty text is one token, not none
    return [*ids[: most - 1], ids[-1]] if ends and len(ids) > most else ids[:most]


class _TextStatistics:
    """What a language model on the held-out text is measured against: no model (unigram bytes) and gzip -9."""

    def __init__(self) -> None:
        self.counts = np.zeros(256, np.int64)
        self.gzip = zlib.compressobj(9, zlib.DEFLATED, 31)
        self.compressed = 0

    def add(self, text: str) -> None:
        raw = text.encode()
        self.counts += np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
        self.compressed += len(self.gzip.compress(raw))

    def summary(self) -> dict[str, Any]:
        size = int(self.counts.sum())
        if not size:
            return {}
        self.compressed += len(self.gzip.flush())
        entropy = -sum(c / size * math.log2(c / size) for c in self.counts.tolist() if c)
        return {
            "eval_bytes": size,
            "baselines": {
                "unigram_bits_per_byte": entropy,
                "gzip_bits_per_byte": self.compressed * 8 / size,
            },
        }
