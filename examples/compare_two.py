"""Train two variants of a recipe in one script, and compare them.

    python compare_two.py [KEY=VALUE …]

The arguments are overrides for both. Writes losses.csv (the training losses side by side) and a
plot of them: losses.png, or without matplotlib compare.html (the curves, in a browser).
"""

import importlib.util
import subprocess
import sys

import pandas as pd

import bigtrain

VARIANTS = {"small": ["model.args.hidden=[32]"], "large": ["model.args.hidden=[256, 256]"]}


def main() -> None:
    common = ["train.steps=400", "train.eval_every=100", *sys.argv[1:]]
    losses = {}
    for name, own in VARIANTS.items():
        bigtrain.train("digits-mlp", [f"name={name}", *own, *common])
        run = bigtrain.open_run(name)
        losses[name] = run.metrics("train").set_index("step")["loss"]
        print(f"{name}: {run.settings['parameters']:,} parameters")
        print(run.metrics("eval")[["step", "loss", "accuracy"]].to_string(index=False))
    table = pd.DataFrame(losses)
    table.to_csv("losses.csv")
    if importlib.util.find_spec("matplotlib"):
        table.plot(ylabel="loss").figure.savefig("losses.png")
    else:
        compare = [sys.executable, "-m", "bigtrain", "compare", *VARIANTS, "--html", "compare.html"]
        subprocess.run(compare, check=True)


if __name__ == "__main__":
    main()
