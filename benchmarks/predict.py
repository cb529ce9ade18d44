"""The rate of `predict` beside a bare batched loop: `python benchmarks/predict.py RUN FILE.jsonl`.

RUN is a run of a text classifier of transformers' (`bigtrain train stdlib-classifier`); FILE.jsonl
has a `text` in each row. Without FILE: 10,000 functions of Python's library. Both sides have the
model loaded; each reads the texts, tokenises, pads, computes and writes a line per text, in turns.

The bare loop takes as many texts at once as predict does, in the order of the file, padded to the
longest of the batch; it checks nothing and cannot go on after a kill.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bigtrain.api import find_export
from bigtrain.inference.predict import Predictor
from bigtrain.inference.predict_files import Request, predict_files
from bigtrain.sources.builtin import BUILT_IN


def bare_loop(folder: Path, texts: Path, out: Path, batch: int, longest: int) -> float:
    """Seconds from the texts to the lines, without the loading of the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    names = model.config.id2label
    began = time.perf_counter()
    rows = [json.loads(line)["text"] for line in texts.open()]
    with out.open("w") as file, torch.inference_mode():
        for start in range(0, len(rows), batch):
            inputs = tokenizer(
                rows[start : start + batch],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            probabilities = model(**inputs.to(device)).logits.float().softmax(-1).cpu().tolist()
            for row in probabilities:
                of_class = {names[number]: value for number, value in enumerate(row)}
                best = max(of_class, key=of_class.__getitem__)
                file.write(json.dumps({"prediction": best, "probabilities": of_class}) + "\n")
    return time.perf_counter() - began


def predict_seconds(folder: Path, texts: Path, out: Path) -> float:
    """The same by `bigtrain predict`: all of the command but the loading of the model."""
    loaded = time.perf_counter()
    Predictor(folder)
    loading = time.perf_counter() - loaded
    began = time.perf_counter()
    predict_files(folder, Request([texts], out, {}))
    return time.perf_counter() - began - loading


def write_functions(path: Path, count: int) -> None:
    """Functions of Python's library, as often as it takes."""
    records = list(BUILT_IN["python-stdlib"].open("text_classification").records())
    with path.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"text": records[number % len(records)]["text"]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("texts", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    folder = find_export(options.run)
    with tempfile.TemporaryDirectory() as temporary:
        texts = options.texts or Path(temporary) / "texts.jsonl"
        if options.texts is None:
            write_functions(texts, options.count)
        num_texts = len(texts.read_text().splitlines())
        predictor = Predictor(folder)
        batch = predictor.batch_size(num_texts)
        longest = predictor.about["seq_len"]
        sides: dict[str, Callable[[Path], float]] = {
            "bare loop": lambda out: bare_loop(folder, texts, out, batch, longest),
            "predict": lambda out: predict_seconds(folder, texts, out),
        }
        ratios = []
        for pair in range(options.pairs):
            rates = {}
            for name, act in sides.items():
                seconds = act(Path(temporary) / f"{name} {pair}")
                rates[name] = num_texts / seconds
            ratios.append(rates["predict"] / rates["bare loop"])
            shown = ", ".join(f"{name} {rate:,.0f} texts/s" for name, rate in rates.items())
            print(f"{shown}; ratio {ratios[-1]:.2f}")
        print(f"{num_texts:,} texts, {batch} at once: predict ÷ bare loop"
              f" {statistics.median(ratios):.2f} (median of {len(ratios)})")  # fmt: skip


if __name__ == "__main__":
    main()
