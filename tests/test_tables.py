"""Tables as people have them: text, true and false, gaps, dates, names; to the raw csv and back."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import bigtrain, on_ranks
from torch import Tensor, nn

import bigtrain as api
from bigtrain.config.loader import load_recipe
from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.datasets import prepare
from bigtrain.data.examples import PreparedData
from bigtrain.data.held_out import is_held_out
from bigtrain.errors import RequestError
from bigtrain.inference.inputs import Usable, find_inputs, make_encoder, table_columns
from bigtrain.models.build import build_model

pytestmark = pytest.mark.trained

ROWS = 344
SPECIES: dict[str, tuple[float, float, float, list[str]]] = {
    "Adelie": (38.8, 18.3, 190, ["Torgersen", "Biscoe", "Dream"]),
    "Chinstrap": (48.8, 18.4, 196, ["Dream"]),
    "Gentoo": (47.5, 15.0, 217, ["Biscoe"]),
}
RECIPE = """\
name: penguins
task: tabular_classification
model: {name: mlp, args: {hidden: [16]}}
data: {train: penguins.csv, columns: {label: species}, eval_fraction: 0.25}
optim: {lr: 0.01}
engine: {global_batch: 32}
train: {steps: 25, eval_every: 25, checkpoint_every: 25}
track: {wandb: "off"}
"""


def penguins() -> pandas.DataFrame:
    """344 rows like those of palmerpenguins, with what people's tables have besides."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(ROWS):
        name = ["Adelie", "Adelie", "Chinstrap", "Gentoo", "Gentoo"][i % 5]
        bill, depth, flipper, islands = SPECIES[name]
        rows.append(
            {
                "tag": f"N{i:04}",
                "species": name,
                "island": draw.choice(islands),
                "bill": round(draw.normal(bill, 3), 1),
                "depth": round(draw.normal(depth, 1.2), 1),
                "flipper": round(draw.normal(flipper, 7)),
                "sex": draw.choice(["male", "female"]),
                "clutch": None if i in (8, 40) else bool(draw.integers(2)),
                "seen": f"2007-11-{1 + i % 28:02}",
                "region": "Anvers",
                "unused": None,
            }
        )
    table = pandas.DataFrame(rows)
    table.loc[[3, 271], ["bill", "depth", "flipper"]] = None
    table.loc[draw.integers(ROWS, size=11), "sex"] = None
    return table


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the table, its recipe, and the finished run."""
    folder = tmp_path_factory.mktemp("tables")
    penguins().to_csv(folder / "penguins.csv", index=False)
    (folder / "penguins.yaml").write_text(RECIPE)
    done = bigtrain("train", "penguins.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "columns.tag=left out: text, 2" in done.stdout.replace("\n", " ")
    return folder


def predicted(folder: Path, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    done = bigtrain("predict", "penguins", *arguments, cwd=folder)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_fate_of_each_column_is_kept(trained: Path) -> None:
    settings = json.loads((trained / "runs/penguins/effective.json").read_text())
    fates = {key: found["value"] for key, found in settings.items() if key.startswith("columns.")}
    count = sum(not is_held_out(str(i), 0.25) for i in range(ROWS))
    medians = penguins()[[not is_held_out(str(i), 0.25) for i in range(ROWS)]].median(
        numeric_only=True
    )
    assert fates == {
        "columns.tag": f"left out: text, {count} different in {count} rows",
        "columns.species": "label",
        "columns.island": "category of 3 values",
        "columns.bill": f"number; missing: the median {medians['bill']:g}, and a flag",
        "columns.depth": f"number; missing: the median {medians['depth']:g}, and a flag",
        "columns.flipper": f"number; missing: the median {medians['flipper']:g}, and a flag",
        "columns.sex": "category of 2 values, and one for missing",
        "columns.clutch": "category of 2 values, and one for missing",
        "columns.seen": "left out: dates",
        "columns.region": "left out: the same in every row",
        "columns.unused": "left out: no values",
    }


def test_predictions_of_the_raw_csv_are_those_of_the_run(trained: Path) -> None:
    rows = predicted(trained, "penguins.csv")
    held_out = [i for i in range(ROWS) if is_held_out(str(i), 0.25)]
    truth = penguins()["species"]
    correct = [rows[i]["prediction"] == truth[i] for i in held_out]
    summary = json.loads((trained / "runs/penguins/summary.json").read_text())
    assert sum(correct) / len(correct) == pytest.approx(summary["accuracy"], abs=1e-7)
    assert summary["accuracy"] > 0.85, "it has learnt"
    evaluated = bigtrain("evaluate", "penguins", "--json", cwd=trained)
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(summary["loss"], rel=1e-6)
    # Prediction by prediction, against the held-out examples of the run itself.
    text = RECIPE.replace("penguins.csv", str(trained / "penguins.csv"))
    (trained / "again.yaml").write_text(text)
    prepared = prepare(load_recipe(trained / "again.yaml").recipe)
    features = torch.from_numpy(
        np.stack([prepared.eval[i]["features"] for i in range(len(held_out))])
    )
    model = api.load_model(trained / "runs/penguins/export")
    with torch.inference_mode():
        probabilities = model(features=features).softmax(1)
    for i, expected in zip(held_out, probabilities.tolist(), strict=True):
        found = rows[i]["probabilities"]
        assert [found[name] for name in prepared.classes] == pytest.approx(expected, abs=2e-6)


def test_rows_from_elsewhere(trained: Path) -> None:
    """New values are unknown and named; extra columns are ignored; order does not matter."""
    (trained / "new.csv").write_text(
        "extra,sex,clutch,island,flipper,depth,bill\n"
        "1,male,TRUE,Biscoe,217,15.1,47.2\n"
        "1,male,true,Biscoe,217,15.1,47.2\n"
        "1,,,Atlantis,190,18,39\n"
        "1,male,False,Biscoe,much,15,47\n"
    )
    first, same, unknown, bad = predicted(trained, "new.csv", "--max-unreadable", "1")
    assert first["probabilities"] == same["probabilities"] and "unknown" not in first
    assert unknown["unknown"] == "island"
    assert bad["error"] == "nothing, or not a finite number, in column flipper"
    record = {"sex": "male", "clutch": True, "island": "Biscoe", "flipper": 217}
    lines = [json.dumps(record | {"depth": 15.1, "bill": 47.2})]
    (trained / "new.jsonl").write_text("\n".join(lines))
    assert predicted(trained, "new.jsonl")[0]["probabilities"] == first["probabilities"]
    (trained / "less.csv").write_text("sex,clutch,islands,flipper,depth,bill\nmale,True,A,1,2,3\n")
    done = bigtrain("predict", "penguins", "less.csv", "--out", "less.jsonl", cwd=trained)
    assert done.returncode == 2 and not (trained / "less.jsonl").exists()
    assert "less.csv: no column 'island'; did you mean islands?" in done.stderr
    done = bigtrain("predict", "penguins", "new.csv", "--out", "o.csv", cwd=trained)
    assert done.returncode == 2, "one of them cannot be used"
    assert "that the training data did not have: 1 (" in done.stderr
    with (trained / "o.csv").open() as file:
        assert [row["unknown"] for row in csv.DictReader(file)] == ["", "", "island", ""]


def test_two_ranks_have_the_same_columns_and_losses(trained: Path) -> None:
    done = on_ranks(2, "train", "penguins.yaml", "name=two", "engine.kind=zero3", cwd=trained)
    assert done.returncode == 0, done.stderr
    losses = []
    for name in ("penguins", "two"):
        lines = (trained / "runs" / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses.append([x["loss"] for x in records if x["kind"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    about = [
        json.loads((trained / f"runs/{name}/export/bigtrain.json").read_text())["table"]
        for name in ("penguins", "two")
    ]
    assert about[0] == about[1]


def recipe_of(path: Path, model: str = "mlp", task: str = "regression", **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "table",
            "task": task,
            "model": {"name": model},
            "data": {"train": str(path), "eval_fraction": 0.3} | data,
        }
    )


def prepared_of(
    tmp_path: Path, table: Mapping[str, Any] | str | bytes, **settings: Any
) -> PreparedData:
    path = tmp_path / "t.csv"
    if isinstance(table, bytes):
        path.write_bytes(table)
    elif isinstance(table, str):
        path.write_text(table)
    else:
        pandas.DataFrame(dict(table)).to_csv(path, index=False)
    return prepare(recipe_of(path, **settings))


def test_features_by_hand(tmp_path: Path) -> None:
    """Numbers, then flags of gaps, then a 1 in each block of categories."""
    colours = ["red", "blue", None, "blue", "red"] * 8
    sizes = [1.0, 2.0, None, 4.0, 9.0] * 8
    table = {"colour": colours, "size": sizes, "height": range(40), "target": range(40)}
    prepared = prepared_of(tmp_path, table)
    train = [i for i in range(40) if not is_held_out(str(i), 0.3)]
    median = np.median([sizes[i] for i in train if sizes[i] is not None])
    filled = np.asarray([median if sizes[i] is None else sizes[i] for i in train], np.float32)
    heights = np.asarray(train, np.float32)
    for place, i in enumerate(train):
        expected = [
            (filled[place] - filled.mean()) / filled.std(),
            (i - heights.mean()) / heights.std(),
            float(sizes[i] is None),
            *(float((colours[i] or "") == value) for value in ("", "blue", "red")),
        ]
        assert prepared.train[place]["features"].tolist() == pytest.approx(expected, abs=1e-5)
        assert prepared.train[place]["target"] == i
    assert prepared.features == 6 and prepared.cardinalities == [3]


class OfFeatures(nn.Module):
    """A user's class, which knows nothing of categories."""

    def __init__(self, in_features: int, num_outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        """[batch, features] → [batch, outputs]."""
        return self.layer(features)


@pytest.mark.parametrize("model", ["linear", "test_tables:OfFeatures"])
def test_other_models_get_one_hot_features(model: str, tmp_path: Path) -> None:
    table = {"colour": ["red", "blue"] * 20, "target": range(40)}
    prepared = prepared_of(tmp_path, table, model=model)
    built = build_model(recipe_of(tmp_path, model), prepared)
    assert [tuple(p.shape) for p in built.parameters()] == [(1, 2), (1,)]


def test_mlp_embeds_and_an_unknown_value_is_nothing(tmp_path: Path) -> None:
    names = [f"town {i % 10}" for i in range(60)]
    table = {"town": names, "x": range(60), "target": range(60)}
    prepared = prepared_of(tmp_path, table)
    model: Any = build_model(recipe_of(tmp_path), prepared)
    (embedding,) = model.embeddings
    assert embedding.weight.shape == (5, 10)
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    known = torch.tensor([[0.5] + [0.0] * 3 + [1.0] + [0.0] * 6, [0.5] + [0.0] * 10])
    model(features=known)
    assert torch.equal(seen[0][0, 1:], embedding.weight[:, 3])
    assert torch.equal(seen[0][1], torch.tensor([0.5, 0, 0, 0, 0, 0]))


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    table = {"tag": [f"t{i}" for i in range(40)], "a": range(40), "b": range(40)}
    table |= {"target": range(40)}
    chosen = prepared_of(tmp_path, table, columns={"features": ["b", "tag"]})
    count = chosen.cardinalities[0]
    assert chosen.columns == {
        "columns.tag": f"category of {count} values",
        "columns.a": "left out: not chosen",
        "columns.b": "number",
        "columns.target": "target",
    }
    assert any("held-out values of tag are new" in note for note in chosen.notes)
    overrides = ["data.columns.features=[a, b]", "data.columns.target=tag"]
    columns = load_recipe("diabetes", overrides).recipe.data.columns
    assert columns == {"features": ["a", "b"], "target": "tag"}
    one = prepared_of(
        tmp_path,
        table,
        columns=load_recipe("diabetes", ["data.columns.features=a"]).recipe.data.columns,
    )
    assert one.features == 1


def test_rows_with_gaps_can_be_refused(tmp_path: Path) -> None:
    table = {"a": [1.0, None, *range(38)], "c": ["x", "y"] * 20, "target": range(40)}
    with pytest.raises(RequestError, match="row 1: nothing, or not a finite number, in column a"):
        prepared_of(tmp_path, table, missing="refuse")
    prepared = prepared_of(tmp_path, table, missing="refuse", max_unreadable=1)
    assert len(prepared.train) + len(prepared.eval) == 39
    assert prepared.features == 3, "no flag"
    with pytest.raises(RequestError, match="missing is for tables"):
        load_recipe("digits-cnn", ["data.missing=refuse"])


def test_a_csv_has_one_type_per_column_and_may_begin_with_a_mark(tmp_path: Path) -> None:
    """Excel writes a byte-order mark; a column may turn out to be text after 10,000 rows."""
    lines = ["house,code,target"] + [f"{i},{i % 7},{i}" for i in range(11_000)]
    lines += ["0.5,A1,1"] * 2
    prepared = prepared_of(tmp_path, "\ufeff".encode() + "\n".join(lines).encode())
    assert prepared.columns["columns.house"] == "number"
    assert prepared.columns["columns.code"] in ("category of 7 values", "category of 8 values")


GAP = "nothing, or not a finite number, in column target"


@pytest.mark.parametrize(
    ("table", "settings", "expected"),
    [
        ("name,target\na,1\nb,2\nc,3\nd,4\n", {}, "name (left out: text, "),
        ("target\n1\n2\n3\n", {}, "no input can be made of a table of one column"),
        ("size,target\n1,2\n3,4\n", {"features": ["siz"]}, "'siz'; did you mean size?"),
        ("size,target\n1,2\n3,4\n", {"features": ["target"]}, "no column 'target'"),
        ("size,price\n1,2\n3,4\n", {"target": "prise"}, "'prise'; did you mean price?"),
        ("a,b,target\n1,,2\n3,,4\n5,,6\n", {"features": ["b"]}, "b (left out: no values)"),
        ("a,target\n1,2\n2,3\n3,\n4,5\n", {}, f"row 2: {GAP}"),
        ("a,target\n1,2\n2,3\n3,many\n4,5\n", {}, f"row 2: {GAP}"),
        ('a,target\n1,2\n"3,4\n5,6\n', {}, "t.csv: cannot be read as csv: "),
        ("a,target\n1,2\n3,4,5\n", {}, "t.csv: cannot be read as csv: "),
        (b"a,target\n\xff,2\n", {}, "t.csv: cannot be read as csv: "),
        ("", {}, "t.csv: cannot be read as csv: "),
    ],
)
def test_bad_tables_are_explained(
    table: str | bytes, settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        prepared_of(tmp_path, table, columns=settings)
    assert expected in str(caught.value)
    assert "\n  expected: " in str(caught.value)


def test_what_is_no_list_of_columns_is_refused() -> None:
    with pytest.raises(RequestError, match="features: found 3"):
        load_recipe("diabetes", ["data.columns.features=3"])
    with pytest.raises(RequestError, match="at least 1 item"):
        load_recipe("diabetes", ["data.columns.features=[]"])


def test_an_export_without_names_of_columns_is_evaluated(tmp_path: Path) -> None:
    """Earlier versions wrote mean and deviation of all columns of numbers, and left out text."""
    draw = np.random.default_rng(0)
    table = pandas.DataFrame({"a": draw.normal(size=80), "b": draw.normal(size=80)})
    table["target"] = table["a"] * 2 + table["b"]
    table.to_csv(tmp_path / "t.csv", index=False)
    settings = ["data.train=t.csv", "train.steps=3", "train.eval_every=3", "name=old"]
    done = bigtrain("train", "diabetes", *settings, "track.wandb=off", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    about = tmp_path / "runs/old/export/bigtrain.json"
    old = json.loads(about.read_text())
    about.write_text(
        json.dumps(
            {key: old[key] for key in old if key not in ("table", "columns", "resize", "seq_len")}
        )
    )
    table["colour"] = ["red", "blue"] * 40
    table.to_csv(tmp_path / "t.csv", index=False)
    again = bigtrain("evaluate", "old", "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["loss"] == pytest.approx(json.loads(done.stdout)["loss"])
    refused = bigtrain("predict", "old", "t.csv", cwd=tmp_path)
    assert refused.returncode == 2
    assert "an earlier version, which did not write down its columns" in refused.stderr


def exported_by(prepared: PreparedData, task: str) -> dict[str, Any]:
    """What an export says of tables."""
    return {"task": task, "classes": prepared.classes} | prepared.preprocessing


def predicted_features(about: dict[str, Any], path: Path) -> list[list[float]]:
    """The features that `predict` makes of a file."""
    inputs = find_inputs([path], TASK_SPECS[about["task"]], {}, table_columns(about))
    encoded = make_encoder(about, None)(inputs.read(0, len(inputs)))
    rows: list[list[float]] = []
    for item in encoded:
        assert isinstance(item, Usable) and not item.unknown
        rows.append(item.example["features"].tolist())
    return rows


def test_a_type_holds_for_all_files_of_a_column(tmp_path: Path) -> None:
    """Codes 01 and 02 are text in any file, for one of training's has X1."""
    (tmp_path / "g").mkdir()
    numbers = [f"0{1 + i % 2},{i % 2 == 0},{i},{i % 3}" for i in range(40)]
    others = [f"X1,TRUE,{i},{i % 3}" for i in range(40)]
    head = "code,flag,size,label\n"
    (tmp_path / "g" / "a.csv").write_text(head + "\n".join(numbers))
    (tmp_path / "g" / "b.csv").write_text(head + "\n".join(others))
    task = "tabular_classification"
    recipe = recipe_of(tmp_path / "g" / "*.csv", task=task)
    prepared = prepare(recipe)
    assert prepared.columns["columns.code"] == "category of 3 values"
    assert prepared.columns["columns.flag"] == "category of 2 values"
    assert prepared.columns["columns.size"] == "number"
    later = tmp_path / "later.csv"
    later.write_text(head + "01,true,1,0\n02,False,2,1\n")
    about = exported_by(prepared, task)
    absent = recipe_of(tmp_path / "absent.csv", task=task, eval=str(later))
    found = prepare(absent, about)
    assert not found.notes and found.classes == ["0", "1", "2"]
    features = [found.eval[i]["features"].tolist() for i in range(2)]
    assert [row[1:] for row in features] == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]]
    assert predicted_features(about, later) == features
    later.write_text(head + "01,true,1,7\n")
    with pytest.raises(RequestError, match="the data has classes"):
        prepare(absent, about)
    with pytest.raises(RequestError, match="no file matches") as caught:
        prepare(recipe_of(tmp_path / "absent.csv", task=task), about)
    assert str(caught.value).endswith("data.eval=FILES")


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_labels_keep_the_text_of_the_file(name: str, tmp_path: Path) -> None:
    rows = [{"a": i, "label": i % 2 if i else None} for i in range(40)]
    lines = [json.dumps(row) for row in rows]
    if name == "t.csv":
        lines = ["a,label"] + [
            f"{row['a']},{'' if i == 0 else i % 2}" for i, row in enumerate(rows)
        ]
    (tmp_path / name).write_text("\n".join(lines))
    recipe = recipe_of(tmp_path / name, task="tabular_classification", max_unreadable=1)
    assert prepare(recipe).classes == ["0", "1"]


def test_large_numbers_are_standardised_before_they_are_rounded(tmp_path: Path) -> None:
    table = {"time": [1_700_000_000 + i for i in range(60)], "target": range(60)}
    prepared = prepared_of(tmp_path, table)
    train = np.asarray([i for i in range(60) if not is_held_out(str(i), 0.3)], np.float64)
    expected = (train - train.mean()) / train.std()
    found = [prepared.train[i]["features"].item() for i in range(len(train))]
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    about = json.loads(json.dumps(exported_by(prepared, "regression")))
    rows = predicted_features(about, tmp_path / "t.csv")
    assert [rows[int(i)][0] for i in train] == found


def test_an_empty_text_beside_null_is_one_category(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"c": ["x", "", None][i % 3], "target": i} for i in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    prepared = prepare(recipe_of(path))
    assert prepared.columns["columns.c"] == "category of 1 values, and one for missing"
    assert prepared.cardinalities == [2]
