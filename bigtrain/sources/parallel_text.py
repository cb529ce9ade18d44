"""A parallel corpus in two sets of text files: line i of the one belongs to line i of the other."""

import glob
import re
from collections.abc import Iterable
from functools import partial
from itertools import zip_longest
from pathlib import Path

from bigtrain.config.recipe import ParallelText
from bigtrain.errors import RequestError
from bigtrain.sources.records import Record, Source, file_stamp


def open_parallel_text(key: str, corpus: ParallelText) -> Source:
    """The source of `corpus`, the value of `key` (data.train, data.eval).

    Raises RequestError for files that do not pair: what the wildcards stand for must be the same on
    both sides, unless there is one file on each.
    """
    sources = _files(f"{key}.source", corpus.source)
    targets = _files(f"{key}.target", corpus.target)
    alone = sources.keys() ^ targets.keys()
    if alone and len(sources) + len(targets) > 2:
        raise RequestError(
            f"{key}: no file belongs to {(sources | targets)[min(alone)]}",
            "the same names on both sides, as a.en and a.de are for *.en and *.de",
        )
    files = [*sources.values(), *targets.values()]
    return Source(f"parallel {file_stamp(files)}", partial(_read, key, files))


def _files(key: str, pattern: str) -> dict[str, Path]:
    """What the wildcards of `pattern` stand for → the file, in the order of these names."""
    head = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    tail = re.split(r"[*?\]]", pattern)[-1]
    files: dict[str, Path] = {}
    for path in glob.glob(pattern, recursive=True):
        if Path(path).is_file():
            files[path.removeprefix(head).removesuffix(tail)] = Path(path)
    if not files:
        raise RequestError(f"{key}: no file matches {pattern!r}", "text files, one text per line")
    return dict(sorted(files.items()))


def _read(key: str, files: list[Path]) -> Iterable[Record]:
    """One record per line. Raises RequestError for a line without a text that belongs to it.

    `files`: those of the sources, then as many of the targets.
    """
    half = len(files) // 2
    for pair in zip(files[:half], files[half:], strict=True):
        # Lines end with a line feed alone: other separators may be part of a text.
        source, target = (path.open(encoding="utf-8-sig", newline="\n") for path in pair)
        try:
            with source, target:
                for number, lines in enumerate(zip_longest(source, target, fillvalue=""), 1):
                    texts = [line.rstrip("\r\n") for line in lines]
                    for file, text in zip(pair, texts, strict=True):
                        if not text.strip():
                            raise RequestError(
                                f"{key}: no text on line {number} of {file}",
                                f"{pair[0]} and {pair[1]} with as many lines, none of them empty",
                            )
                    yield {"source": texts[0], "target": texts[1]}
        except UnicodeDecodeError:
            raise RequestError(f"{key}: {pair[0]} or {pair[1]} is not UTF-8", "UTF-8") from None
