"""Make the pictures of README and docs from real runs: `python tools/screenshots.py`.

Trains in a temporary folder (two minutes on two cores); writes docs/images/compare.png and
evaluation.png, which need Chromium, and live.svg.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from bigtrain.tracking.terminal import Terminal

IMAGES = Path(__file__).parent.parent / "docs" / "images"
LIVE_STEPS = 400
SHOWN_STEP = 265  # where the live panel is drawn
LARGEST_PICTURE = 200_000  # bytes


def main() -> None:
    """All pictures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        picture_of_compare_page(Path(folder))
        picture_of_evaluation_page(Path(folder))
        picture_of_live_panel(Path(folder))


def bigtrain(folder: Path, *arguments: str) -> None:
    """A bigtrain command in `folder`. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "bigtrain", *arguments]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def picture_of_compare_page(folder: Path) -> None:
    """Three learning rates compared."""
    settings = ["optim.lr=3e-4,1e-3,3e-3", "engine.global_batch=128"]
    settings += ["train.steps=400", "train.eval_every=40", "track.wandb=off"]
    bigtrain(folder, "sweep", "digits-mlp", *settings)
    page = folder / "runs.html"
    bigtrain(folder, "compare", "digits-mlp-lr*", "--html", str(page))
    photograph(page, "compare.png", (1100, 982))


def picture_of_evaluation_page(folder: Path) -> None:
    """Two classes, so that the page has all its plots."""
    bigtrain(folder, "train", "breast-cancer", "track.wandb=off")
    page = folder / "evaluation.html"
    bigtrain(folder, "evaluate", "breast-cancer", "--html", str(page))
    photograph(page, "evaluation.png", (1200, 900))


def photograph(page: Path, name: str, size: tuple[int, int]) -> None:
    """The top of a page as Chromium shows it, in few colours."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium here; try: apt-get install chromium")
    picture = IMAGES / name
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}"]
    subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True)
    Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)
    if picture.stat().st_size > LARGEST_PICTURE:
        sys.exit(f"{picture} has {picture.stat().st_size:,} bytes; expected {LARGEST_PICTURE:,}")
    print(f"{picture} written")


def picture_of_live_panel(folder: Path) -> None:
    """The panel in the middle of a run, fed with what the run wrote to its metrics.jsonl."""
    steps = [f"train.steps={LIVE_STEPS}", "train.eval_every=100", "train.checkpoint_every=100"]
    bigtrain(folder, "train", "tiny-lm", *steps, "track.wandb=off")
    lines = (folder / "runs" / "tiny-lm" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]

    screen = Console(record=True, width=86, file=io.StringIO(), force_terminal=True)
    screen.print("$ bigtrain train tiny-lm", style="bold", highlight=False)
    live_console = Console(width=86, file=io.StringIO(), force_terminal=True)
    panel = Terminal(LIVE_STEPS, "tokens", live_console)
    assert panel.live is not None  # the console is a terminal
    for record in records:
        if record["step"] <= SHOWN_STEP:
            panel.log(record)
            print_line_above_panel(record, screen)
    screen.print(panel.live.get_renderable())
    panel.close({})

    text = screen.export_svg(title="bigtrain")
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)  # they are fetched
    text = re.sub(r"font-family: [^;]*;", "font-family: monospace;", text)
    (IMAGES / "live.svg").write_text(text, encoding="utf-8")
    print(f"{IMAGES / 'live.svg'} written")


def print_line_above_panel(record: dict[str, Any], screen: Console) -> None:
    """Evaluations, as a terminal prints them above its panel."""
    if record["kind"] == "eval":
        plain = Console(width=200, file=io.StringIO())
        Terminal(LIVE_STEPS, "tokens", plain).log(record)
        screen.print(plain.file.getvalue().strip(), highlight=False, markup=False)


if __name__ == "__main__":
    main()
