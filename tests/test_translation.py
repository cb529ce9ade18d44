"""Translation: two text files whose lines belong together, and BLEU of what a model writes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sacrebleu
import torch
from conftest import bigtrain, on_ranks
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from bigtrain.config.loader import load_recipe
from bigtrain.config.recipe import ParallelText
from bigtrain.data.datasets import prepare
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RecipeError, RequestError
from bigtrain.models.greedy import write_targets
from bigtrain.runs.metrics_file import read_metrics
from bigtrain.sources.parallel_text import open_parallel_text

pytestmark = pytest.mark.trained

SIDES = {"source": "en", "target": "de"}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]


def write_corpus(folder: Path, count: int = 240) -> None:
    """Sentences about numbers in two languages, in two pairs of files."""
    english: list[list[str]] = [[], []]
    german: list[list[str]] = [[], []]
    for number in range(count):
        first, second, third = number % 9, number // 9 % 9, number * 7 % 9
        words = f"{NUMBERS[first]} and {NUMBERS[second]} and {NUMBERS[third]}"
        english[number % 2].append(f"the sum of {words}")
        words = f"{ZAHLEN[first]} und {ZAHLEN[second]} und {ZAHLEN[third]}"
        german[number % 2].append(f"hier ist die Summe aus {words}")
    folder.mkdir()
    for part in range(2):
        (folder / f"{part}.en").write_text("\n".join(english[part]) + "\n")
        (folder / f"{part}.de").write_text("\n".join(german[part]))  # no line feed at the end


def records(folder: Path, source: str, target: str) -> list[Any]:
    corpus = ParallelText(source=str(folder / source), target=str(folder / target))
    return list(open_parallel_text("data.train", corpus).records())


def test_line_i_of_the_one_belongs_to_line_i_of_the_other(tmp_path: Path) -> None:
    """A line ends with a line feed alone, not with the other signs that Python splits text at."""
    (tmp_path / "b.1.en").write_bytes("one\u2028still one\ntwo \x0c still two\r\n".encode())
    (tmp_path / "b.1.de").write_bytes(b"eins\nzwei\r\n")
    (tmp_path / "a.en").write_text("three")
    (tmp_path / "a.de").write_text("drei\n")
    found = [tuple(record.values()) for record in records(tmp_path, "*.en", "*.de")]
    pairs = [("three", "drei"), ("one\u2028still one", "eins"), ("two \x0c still two", "zwei")]
    assert found == pairs
    assert records(tmp_path, "[ab]*.en", "[ab]*.de") == records(tmp_path, "*.en", "*.de")
    (tmp_path / "mark.en").write_bytes("\ufeffthree".encode())
    (tmp_path / "mark.de").write_text("drei")
    assert records(tmp_path, "mark.e?", "mark.d?") == [{"source": "three", "target": "drei"}]
    for file in tmp_path.glob("mark.*"):
        file.unlink()
    (tmp_path / "other.txt").write_text("trois")  # two single files are a pair whatever their names
    assert records(tmp_path, "a.en", "other.txt") == [{"source": "three", "target": "trois"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.en": "1\n2\n", "a.de": "1\n"}, "no text on line 2 of {folder}/a.de"),
        ({"a.en": "1\n", "a.de": "1\n2\n3\n"}, "no text on line 2 of {folder}/a.en"),
        ({"a.en": "1\n \n3\n", "a.de": "1\n2\n3\n"}, "no text on line 2 of {folder}/a.en"),
        ({"a.en": "1\n", "b.en": "1\n", "a.de": "1\n"}, "no file belongs to {folder}/b.en"),
        ({"a.en": "1\n", "b.en": "1\n", "a.de": "1\n", "c.de": "1\n"}, "belongs to {folder}/b.en"),
        ({"a.en": "1\n"}, "data.train.target: no file matches"),
        ({"a.en": b"\xff\n", "a.de": "1\n"}, "is not UTF-8"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    files: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    overrides = [f"data.train.source={tmp_path}/*.en", f"data.train.target={tmp_path}/*.de"]
    with pytest.raises(RequestError) as caught:
        prepare(load_recipe("translation-transformer", overrides).recipe)
    assert expected.format(folder=tmp_path) in str(caught.value)


def test_a_pair_of_files_is_for_sequences_to_sequences_alone(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a source and a target is for seq2seq"):
        load_recipe("tiny-lm", ["data.train.source=a", "data.train.target=b"])
    with pytest.raises(RecipeError, match=r"unknown key data\.train\.sorce"):
        load_recipe("translation-transformer", ["data.train.sorce=a"])
    (tmp_path / "a.txt").write_text("text")
    recipe = load_recipe("translation-transformer", [f"data.train={tmp_path}/a.txt"]).recipe
    with pytest.raises(RequestError, match="source: FILES, target: FILES"):
        prepare(recipe)


def test_bleu_is_sacrebleus_of_what_the_exported_model_writes(tmp_path: Path) -> None:
    """On two ranks with sharded weights and shares of the held-out set that are not even; computed
    again here from the export, one sentence at a time.
    """
    write_corpus(tmp_path / "corpus")
    settings = ["data.train.source=corpus/*.en", "data.train.target=corpus/*.de"]
    settings += ["data.eval_fraction=0.15", "data.seq_len=24", "optim.lr=1e-2"]
    settings += ["engine.micro_batch=8", "engine.global_batch=16", "engine.kind=zero3"]
    settings += ["train.steps=40", "train.eval_every=20", "train.checkpoint_every=20"]
    settings += ["train.keep_best=bleu", "track.wandb=off", "optim.warmup_steps=5"]
    settings += ["model.args={d_model: 32, d_kv: 16, d_ff: 64, num_layers: 1, num_heads: 2}"]
    done = on_ranks(2, "train", "translation-transformer", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "translation-transformer"
    evaluations = list(read_metrics(run / "metrics.jsonl", "eval"))
    assert all("bleu" in line for line in evaluations), "the best checkpoint is found by it"
    bleu = json.loads((run / "summary.json").read_text())["bleu"]
    assert bleu == pytest.approx(max(line["bleu"] for line in evaluations))
    assert bleu > 1, "there is something to compare"

    overrides = [f"data.train.{side}={tmp_path}/corpus/*.{end}" for side, end in SIDES.items()]
    recipe = load_recipe(str(run / "recipe.yaml"), overrides)
    held_out = prepare(recipe.recipe).eval
    assert len(held_out) % 16, "a last batch that does not divide"
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    written = [write_alone(model, torch.from_numpy(one["source"]), tokenizer) for one in held_out]
    true = [tokenizer.decode(one["target"], skip_special_tokens=True) for one in held_out]
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(written, [true]).score, abs=1e-6)

    again = bigtrain("evaluate", "translation-transformer", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["bleu"] == pytest.approx(bleu, abs=1e-6)


@torch.no_grad()
def write_alone(model: Any, source: Tensor, tokenizer: Any) -> str:
    """The likeliest token each time, by whole forward passes, without padding."""
    written = [tokenizer.pad_token_id]
    while len(written) <= 24 and written[-1] != tokenizer.eos_token_id:
        logits = model(input_ids=source[None], decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(written, skip_special_tokens=True))


class OnlyForward(nn.Module):
    """A model of a user: it returns logits, and has no `generate`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Tensor:
        """Token ids → logits [batch, target length, vocabulary]."""
        return self.inner(**inputs).logits


@torch.no_grad()
def test_a_class_of_ones_own_writes_what_transformers_would() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 20, (3, 7))
    batch = {"input_ids": ids, "attention_mask": (ids > 3).long()}
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    data = PreparedData([], [], 1, seq_len=6, tokenizer=tokenizer)
    cached = write_targets(model, batch, data, ranks_together=False)
    plain = write_targets(OnlyForward(model), batch, data, ranks_together=False)
    for one, other in zip(cached, plain, strict=True):
        end = (other == 1).nonzero()
        stop = int(end[0]) if len(end) else cached.shape[1]
        assert one[:stop].tolist() == other[:stop].tolist()
