"""Train every shipped recipe that needs no GPU and print the README's table of held-out results.

python benchmarks/recipes.py [NAME …]
"""

import json
import subprocess
import sys
import time
from pathlib import Path

METRICS = ("bits_per_byte", "accuracy", "recall", "f1", "exact_match", "r2")
ALL = {
    "tiny-lm": "Transformer",
    "rnn-lm": "LSTM",
    "digits-cnn": "CNN",
    "digits-resnet": "ResNet",
    "digits-rnn": "LSTM over rows",
    "digits-mlp": "MLP",
    "dates-seq2seq": "encoder-decoder",
    "stdlib-classifier": "BERT",
    "breast-cancer": "logistic regression",
    "diabetes": "linear regression",
}


def main() -> None:
    """Train, one after another, below runs/ here; a run that has finished is not repeated."""
    print("| recipe | model | parameters | steps | seconds | held-out result |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[1:] or ALL:
        command = [
            sys.executable,
            "-m",
            "bigtrain",
            "train",
            name,
            "track.wandb=off",
            "--fresh",
            "--json",
        ]
        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - began
        summary = json.loads(done.stdout)
        result = ", ".join(
            f"{metric} {summary[metric]:.4g}" for metric in METRICS if metric in summary
        )
        baselines = summary["baselines"]
        if baselines:
            unigram, gzip = baselines["unigram_bits_per_byte"], baselines["gzip_bits_per_byte"]
            result += f" (unigram {unigram:.2f}, gzip -9 {gzip:.2f})"
        size = f"{summary['parameters']:,}"
        print(
            f"| `{name}` | {ALL.get(name, '')} | {size} | {summary['step']:,} "
            f"| {seconds:.0f} | {result} |",
            flush=True,
        )


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    main()
