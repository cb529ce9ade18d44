"""Text to token ids, once: a memory-mapped cache keyed by everything it was made from.

Whoever takes the lock builds it; other ranks (and other runs) wait for it and map the same pages.
"""

import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from bigtrain.config.recipe import Recipe, TokenizerConfig
from bigtrain.config.task_specs import TASK_SPECS, TaskSpec
from bigtrain.data.held_out import is_held_out, refuse_empty, split_key
from bigtrain.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stamp, vocabulary_size
from bigtrain.errors import RequestError
from bigtrain.sources.records import Record, Source

_VERSION = 2  # of the cache's format and of how text becomes ids
_BATCH = 64  # texts that the tokenizer encodes at once, on all cores


class Ragged:
    """Sequences of ids of different lengths: a flat file of ids and one of ends, memory-mapped."""

    def __init__(self, path: Path) -> None:
        ends = path.with_suffix(".ends.npy")
        self.ends: NDArray[np.int64] = np.load(ends, mmap_mode="r", allow_pickle=False)
        dtype = np.dtype(path.with_suffix(".dtype").read_text())
        size = int(self.ends[-1]) if len(self.ends) else 0
        self.flat: NDArray[Any] = np.empty(0, dtype)
        if size:  # an empty file cannot be mapped
            self.flat = np.memmap(path.with_suffix(".bin"), dtype, mode="r", shape=(size,))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        start = int(self.ends[index - 1]) if index else 0
        return self.flat[start : int(self.ends[index])].astype(np.int64)


class _RaggedWriter:
    """Writes what Ragged reads."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.lengths: list[int] = []
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
    """An opened cache: the tokenizer, and for each part ("train", "eval") its texts and labels."""

    folder: Path
    meta: dict[str, Any]
    tokenizer: Any  # transformers.PreTrainedTokenizerFast

    def field(self, part: str, name: str) -> Ragged:
        return Ragged(self.folder / f"{part}-{name}")

    def labels(self, part: str) -> NDArray[np.int64]:
        return np.load(self.folder / f"{part}-label.npy", allow_pickle=False)


def open_cache(recipe: Recipe, source: Source, evaluation: Source | None) -> TokenCache:
    """The token cache for this data, built now if there is none yet."""
    tokenizer_spec = _tokenizer_spec(recipe)
    made_from = [
        _VERSION,
        recipe.task,
        source.identity,
        evaluation.identity if evaluation else recipe.data.eval_fraction,
        tokenizer_stamp(tokenizer_spec),
        recipe.data.columns,
    ]
    if not TASK_SPECS[recipe.task].is_packed:
        made_from.append(recipe.data.seq_len)  # texts are stored as they were cut
    folder = cache_root() / "tokens" / blake3(json.dumps(made_from).encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "meta.json").is_file():
            building = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                _build(building, recipe, tokenizer_spec, source, evaluation)
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    return TokenCache(folder, meta, load_tokenizer(str(folder / "tokenizer")))


def cache_root() -> Path:
    """Where everything is kept that can be made again; no run needs it."""
    return Path(os.environ.get("BIGTRAIN_CACHE") or Path.home() / ".cache" / "bigtrain")


def _tokenizer_spec(recipe: Recipe) -> str | dict[str, Any]:
    """The settings of a tokenizer to train, or `bytes`, a folder or a hub id."""
    tokenizer = recipe.data.tokenizer
    if isinstance(tokenizer, TokenizerConfig):
        return tokenizer.model_dump()
    if tokenizer == "auto":
        return recipe.model.pretrained or "bytes"
    return tokenizer


class _Placed(NamedTuple):
    """A record and the part ("train" or "eval") that it belongs to."""

    part: str
    record: Record


def _build(
    folder: Path,
    recipe: Recipe,
    tokenizer_spec: str | dict[str, Any],
    source: Source,
    evaluation: Source | None,
) -> None:
    spec = TASK_SPECS[recipe.task]
    console = Console(stderr=True)
    if isinstance(tokenizer_spec, dict):
        kind, size = tokenizer_spec["train"], tokenizer_spec["vocab_size"]
        console.print(f"training a {kind} tokenizer of {size:,} entries")
    unreadable: set[str] = set()  # a set, because the records are read twice
    records = _read(recipe, source, evaluation, unreadable)
    tokenizer = make_tokenizer(tokenizer_spec, _training_texts(records, spec))
    if tokenizer.eos_token_id is None and spec.is_language:
        raise RequestError(
            f"data.tokenizer: {tokenizer_spec} has no end-of-text token",
            "a tokenizer with eos_token",
        )
    tokenizer.save_pretrained(folder / "tokenizer")
    records = _read(recipe, source, evaluation, unreadable)
    writer = _CacheWriter(folder, recipe, tokenizer)
    for batch in track(
        _batches(records),
        "tokenising",
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    ):
        writer.add(batch)
    meta = writer.close()
    refuse_empty(meta["records"], recipe, unreadable)
    meta["bad"] = sorted(unreadable)
    (folder / "meta.json").write_text(json.dumps(meta))


def _read(
    recipe: Recipe, source: Source, evaluation: Source | None, unreadable: set[str]
) -> Iterator[_Placed]:
    """All records that can be read; the others are named in `unreadable`."""
    spec = TASK_SPECS[recipe.task]
    for index, record in enumerate(source.records()):
        if problem := _text_problem(record, spec):
            unreadable.add(f"record {index} of data.train: {problem}")
            continue
        part = "train"
        if evaluation is None:
            key = split_key(record, index, spec.fields[0])
            part = "eval" if is_held_out(key, recipe.data.eval_fraction) else "train"
        yield _Placed(part, record)
    if evaluation is None:
        return
    for index, record in enumerate(evaluation.records()):
        if problem := _text_problem(record, spec):
            unreadable.add(f"record {index} of data.eval: {problem}")
        else:
            yield _Placed("eval", record)


def _text_problem(record: Record, spec: TaskSpec) -> str:
    """What is wrong with a record; empty: nothing."""
    for field in spec.fields:
        value = record[field]
        if value is None or (field != "label" and not isinstance(value, str)):
            return f"{field} is {type(value).__name__}, not text"
    return ""


def _text_fields(spec: TaskSpec) -> list[str]:
    return [field for field in spec.fields if field != "label"]


def _training_texts(records: Iterator[_Placed], spec: TaskSpec) -> Iterator[str]:
    for part, record in records:
        if part == "train":
            for field in _text_fields(spec):
                yield record[field]


def _batches(records: Iterator[_Placed]) -> Iterator[list[_Placed]]:
    while batch := list(islice(records, _BATCH)):
        yield batch


def encode(texts: list[str], tokenizer: Any, spec: TaskSpec) -> list[list[int]]:
    """The ids of whole texts."""
    encoded = tokenizer(texts, add_special_tokens=not spec.is_packed, return_attention_mask=False)
    return encoded["input_ids"]


def fit(ids: list[int], tokenizer: Any, spec: TaskSpec, seq_len: int) -> list[int]:
    """The ids of a text as a model of the task is given them.

    A packed text is whole and ended; any other is cut to `seq_len`, and never empty. Sources
    and targets that are cut keep the end-of-text token.
    """
    eos = tokenizer.eos_token_id
    if spec.is_packed:
        return [*ids, eos]
    must_end = spec.is_language
    if not ids or (must_end and ids[-1] != eos):
        ids = [*ids, eos or 0]
    if len(ids) <= seq_len:
        return ids
    if must_end:
        return [*ids[: seq_len - 1], ids[-1]]
    return ids[:seq_len]


class _CacheWriter:
    """Writes the ids and labels of records, batch by batch, into a cache's folder."""

    def __init__(self, folder: Path, recipe: Recipe, tokenizer: Any) -> None:
        self.folder = folder
        self.spec = TASK_SPECS[recipe.task]
        self.seq_len = recipe.data.seq_len
        self.tokenizer = tokenizer
        self.vocab_size = vocabulary_size(tokenizer)
        self.fields = _text_fields(self.spec)
        self.labels: dict[str, list[str]] = {"train": [], "eval": []}
        self.num_cut = 0
        self.statistics = _TextStatistics()
        self.writers: dict[tuple[str, str], _RaggedWriter] = {}
        for part in self.labels:
            for field in self.fields:
                path = folder / f"{part}-{field}"
                self.writers[part, field] = _RaggedWriter(path, self.vocab_size)

    def add(self, batch: list[_Placed]) -> None:
        for field in self.fields:
            texts = [placed.record[field] for placed in batch]
            encoded = encode(texts, self.tokenizer, self.spec)
            for placed, ids in zip(batch, encoded, strict=True):
                self.writers[placed.part, field].add(self._fit(ids))
                if self.spec.is_packed and placed.part == "eval":
                    self.statistics.add(placed.record[field])
        if self.spec.has_labels:
            for part, record in batch:
                self.labels[part].append(str(record["label"]))

    def _fit(self, ids: list[int]) -> list[int]:
        if not self.spec.is_packed and len(ids) > self.seq_len:
            self.num_cut += 1
        return fit(ids, self.tokenizer, self.spec, self.seq_len)

    def close(self) -> dict[str, Any]:
        """Finish all files; returns what meta.json says of them."""
        for writer in self.writers.values():
            writer.close()
        first = self.fields[0]
        return {
            "records": {part: len(self.writers[part, first].lengths) for part in self.labels},
            "classes": self._write_labels(),
            "cut": self.num_cut,
            "vocab_size": self.vocab_size,
            **self.statistics.summary(),
        }

    def _write_labels(self) -> list[str]:
        """Write the labels of each part as class numbers; returns the classes."""
        classes = sorted({*self.labels["train"], *self.labels["eval"]})
        numbers = {name: number for number, name in enumerate(classes)}
        for part, names in self.labels.items():
            column = np.asarray([numbers[name] for name in names], np.int64)
            np.save(self.folder / f"{part}-label.npy", column)
        return classes


class _TextStatistics:
    """What a language model is compared with on the held-out text: byte frequencies and gzip -9."""

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
        shares = [count / size for count in self.counts.tolist() if count]
        entropy = -sum(share * math.log2(share) for share in shares)
        return {
            "eval_bytes": size,
            "baselines": {
                "unigram_bits_per_byte": entropy,
                "gzip_bits_per_byte": self.compressed * 8 / size,
            },
        }
