"""Recipes: strict, complete errors with file and line, typed overrides, known origins, and none
that rots.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import bigtrain, quickest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from bigtrain.config.loader import flatten, load_recipe, shipped_recipes, to_yaml
from bigtrain.config.recipe import Recipe, TokenizerConfig
from bigtrain.config.renamed_keys import RENAMED_KEYS
from bigtrain.config.resume_policy import diff_recipes
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RecipeError, RequestError
from bigtrain.models.build import build_model

BROKEN = """\
name: broken
task: causal_lm
seed: 1.5
model: {name: gpt2}
data:
  train: python-stdlib
  seq_len: many
optim:
  learning_rate: 1e-4
  lr: no
seed: 2
engine: {offload: optimizer, kind: ddp}
train: {steps: 0}
"""


def test_every_error_is_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), ["track.wandb=perhaps"])
    text = str(caught.value)
    for expected in (
        "8 errors",
        f"{path}:3: seed: found 1.5 (a number); expected an integer",
        f"{path}:11: duplicate key seed (first on line 3)",
        f"{path}:7: data.seq_len: found 'many' (text); expected an integer",
        f"{path}:9: unknown key optim.learning_rate",
        f"{path}:10: optim.lr: found 'no' (text); expected a number",
        f"{path}:12: engine: offload needs kind: zero1, zero2 or zero3",
        f"{path}:13: train.steps: found 0 (a whole number); expected greater than or equal to 1",
        "override track.wandb=perhaps: track.wandb: found 'perhaps' (text); "
        "expected 'auto', 'online', 'offline' or 'off'",
    ):
        assert expected in text, text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rat=1", "unknown key optim.learning_rat; did you mean optim.lr?"),
        ("engin.kind=zero2", "unknown key engin; did you mean engine?"),
        (
            "modle.name=mlp",
            "overrides: 1 error\n  override modle.name=mlp: unknown key modle; did you mean model?",
        ),
        (
            "train.keep_best=r2",
            "overrides: 1 error\n  override train.keep_best=r2: train.keep_best is r2;",
        ),
        ("data.augment.crop=2", "override data.augment.crop=2: data.augment is for image"),
        ("optim.momentum=0.9", "override optim.momentum=0.9: optim: momentum is for sgd"),
        ("optim.micro_batch=2", "did you mean engine.micro_batch?"),
        ("optim.warmup=2", "did you mean optim.warmup_steps?"),
        ("optim.lr=fast", "optim.lr: found 'fast' (text); expected a number"),
        ("optim.lr", "expected key=value"),
        ("name=../x", "name: found '../x'"),
        ("seed.x=1", "seed is 0"),
        (
            "data.tokenizer.vocab_siz=9",
            "1 error\n  override data.tokenizer.vocab_siz=9:"
            " unknown key data.tokenizer.vocab_siz; did you mean data.tokenizer.vocab_size?",
        ),
        ("engine.micro_batch=none", "expected an integer or 'auto'"),
        ("engine.micro_batch={int: 1}", "engine.micro_batch: found {'int': 1} (a mapping)"),
        ("data.tokenizer=5", "expected 'auto' or 'bytes' or a mapping or a string"),
        ("optim.nesterov=true", "nesterov needs"),
        ("optim.lr=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_names_the_right_one(override: str, expected: str) -> None:
    with pytest.raises(RecipeError, match="error") as caught:
        load_recipe("tiny-lm", ["seed=0", override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_answered_with_its_new_name(old: str, new: str, tmp_path: Path) -> None:
    section, _, name = old.partition(".")
    text = to_yaml(load_recipe("diabetes").recipe).replace(
        f"{section}:\n", f"{section}:\n  {name}: 1\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    line = text.splitlines().index(f"  {name}: 1") + 1
    message = f"unknown key {old}; it is called {new} now"
    for place, load in (
        (f"{tmp_path}/recipe.yaml:{line}", lambda: load_recipe(tmp_path / "recipe.yaml")),
        (f"override {old}=1", lambda: load_recipe("diabetes", [f"{old}=1"])),
    ):
        with pytest.raises(RecipeError) as caught:
            load()
        assert f"{place}: {message}" in str(caught.value)
    recipe = load_recipe("diabetes").recipe
    with pytest.raises(RequestError, match=f"--allow-change {old}: no such key") as refused:
        diff_recipes(recipe, recipe, [old])
    assert f"--allow-change {new}" in str(refused.value)


def test_the_recipe_of_a_run_made_before_a_renaming_loads(tmp_path: Path) -> None:
    """Known by effective.json beside it. An override is the user's: it must have the new name."""
    recipe = load_recipe(
        "diabetes",
        ["data.max_unreadable=3", "train.keep_last=4", "optim.alpha=0.5", "track.extra=[trackio]"],
    ).recipe
    text = to_yaml(recipe)
    for old, new in RENAMED_KEYS.items():
        text = text.replace(f"  {new.partition('.')[2]}:", f"  {old.partition('.')[2]}:")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="5 errors"):
        load_recipe(path)
    (tmp_path / "effective.json").write_text("{}")
    loaded = load_recipe(path)
    assert loaded.recipe == recipe
    line = text.splitlines().index("  keep: 4") + 1
    assert loaded.origins["train.keep_last"] == f"recipe {path}:{line}"
    assert load_recipe(path, ["train.keep_last=9"]).recipe.train.keep_last == 9
    with pytest.raises(RecipeError, match=r"train\.keep; it is called train\.keep_last now"):
        load_recipe(path, ["train.keep=9"])


@pytest.mark.parametrize(
    "text",
    ["", "- a", "name: [", "a: &x {b: *x}", "\t", "name: x\n  y: z", "!!python/object:os.system x"],
)
def test_no_yaml_text_shows_a_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(str(tmp_path / "r.yaml"))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_as_recipe_or_override_is_either_loaded_or_explained(text: str) -> None:
    try:
        load_recipe("diabetes", [text])
    except RecipeError as problem:
        assert str(problem)


def test_overrides_are_typed_like_yaml_and_remembered() -> None:
    loaded = load_recipe(
        "tiny-lm",
        ["optim.lr=3e-4", "model.args.num_hidden_layers=2", "track.tags=[a, b]", "train.steps=7"],
    )
    assert loaded.recipe.optim.lr == 3e-4
    assert loaded.recipe.model.args["num_hidden_layers"] == 2
    assert loaded.recipe.track.tags == ["a", "b"]
    assert loaded.origins["optim.lr"] == "override optim.lr=3e-4"
    assert (
        loaded.origins["model.args.num_hidden_layers"] == "override model.args.num_hidden_layers=2"
    )
    assert loaded.origins["model.args.hidden_size"].startswith("recipe ")
    assert loaded.origins["optim.eps"] == "default"
    assert loaded.origins["optim.betas"].startswith("recipe ")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_resolved_recipe_loads_back_to_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).recipe
    (tmp_path / "resolved.yaml").write_text(to_yaml(recipe))
    assert load_recipe(str(tmp_path / "resolved.yaml")).recipe == recipe
    assert all(origin for origin in load_recipe(name).origins.values())
    assert set(load_recipe(name).origins) == set(flatten(recipe.model_dump()))


def facts(recipe: Recipe) -> PreparedData:
    """What the data of a recipe would say of the model's shape."""
    vocab = (
        recipe.data.tokenizer.vocab_size
        if isinstance(recipe.data.tokenizer, TokenizerConfig)
        else 258
    )
    text = recipe.task in ("causal_lm", "seq2seq", "text_classification")
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, bos_token_id=None) if text else None
    size = recipe.data.image_size or 8
    return PreparedData(
        train=[],
        eval=[],
        tokens_per_sample=1,
        tokenizer=tokenizer,
        vocab_size=vocab if text else None,
        classes=[str(i) for i in range(10)] if "classification" in recipe.task else [],
        image=(3 if size == 224 else 1, size, size) if "image" in recipe.task else None,
        features=10,
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_builds_its_model(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).recipe
    if recipe.model.pretrained:  # no hub here: a local folder stands for the hub id
        LlamaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
        ).save_pretrained(tmp_path)
        recipe = load_recipe(name, [f"model.pretrained={tmp_path}"]).recipe
    with torch.device("meta"):
        model = build_model(recipe, facts(recipe))
    count = sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())
    expected = {
        "gpt2-124m": (110e6, 130e6),
        "llama-1b": (1.0e9, 1.3e9),
        "llama-8b-zero3": (7.9e9, 8.1e9),
    }
    low, high = expected.get(name, (1, 30e6))
    assert low <= count <= high, count


@pytest.mark.timed
def test_help_and_a_misspelt_key_answer_at_once() -> None:
    for arguments, code in ((["--help"], 0), (["train", "tiny-lm", "optim.learning_rat=1"], 2)):
        command = [sys.executable, "-m", "bigtrain", *arguments]
        assert subprocess.run(command, capture_output=True, check=False).returncode == code
        assert (
            quickest(
                lambda command=command: subprocess.run(command, capture_output=True, check=False),
                0.25,
            )
            < 0.25
        )


def test_lower_floors_do_not_import_torch() -> None:
    modules = ", ".join(
        f"bigtrain.{name}"
        for name in (
            "config.loader",
            "engine.plan",
            "engine.launcher",
            "engine.deepspeed_config",
            "runs.directory",
            "runs.status",
            "cluster.slurm",
            "cluster.sweep",
            "cli",
        )
    )
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_init_writes_a_recipe_that_loads_and_never_overwrites(tmp_path: Path) -> None:
    assert bigtrain("init", "mine", "--from", "diabetes", cwd=tmp_path).returncode == 0
    assert load_recipe(str(tmp_path / "mine.yaml")).recipe.name == "mine"
    before = (tmp_path / "mine.yaml").read_bytes()
    assert bigtrain("init", "mine", cwd=tmp_path).returncode == 2
    assert (tmp_path / "mine.yaml").read_bytes() == before


def test_recipes_and_schema_print(tmp_path: Path) -> None:
    listed = bigtrain("recipes", cwd=tmp_path).stdout
    assert all(name in listed for name in shipped_recipes())
    assert '"engine"' in bigtrain("schema", cwd=tmp_path).stdout


def test_true_and_false_of_earlier_versions_are_full_and_none(tmp_path: Path) -> None:
    texts = {"true": "full", "false": "none", "2": 2, "selective": "selective", "auto": "auto"}
    for text, expected in texts.items():
        recipe = load_recipe("diabetes", [f"engine.activation_checkpointing={text}"]).recipe
        assert recipe.engine.activation_checkpointing == expected
    new = load_recipe("diabetes", ["engine.activation_checkpointing=full"]).recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(new).replace("checkpointing: full", "checkpointing: true"))
    assert load_recipe(path).recipe == new
    for wrong in ("0", "half", "1.5", "null"):
        with pytest.raises(RecipeError) as caught:
            load_recipe("diabetes", [f"engine.activation_checkpointing={wrong}"])
        assert "expected 'none', 'full' or 'selective' or " in str(caught.value)
