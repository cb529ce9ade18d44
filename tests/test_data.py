"""Data: an order that sees all once, exact cuts, and bad data explained before training."""

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS, MetricName, TaskName, lower_is_better
from bigtrain.data import loader as data_loader
from bigtrain.data.datasets import prepare
from bigtrain.data.loader import eval_batches, shifted, train_batches
from bigtrain.data.order import key, mix, permute, samples_at
from bigtrain.engine.plan import Plan
from bigtrain.errors import BadSampleError, RequestError, TrainingFailed
from bigtrain.sources.builtin import BUILT_IN
from bigtrain.tasks.registry import TASKS

MODEL_FOR_TASK = {
    "causal_lm": "rnn",
    "seq2seq": "t5",
    "image_classification": "cnn",
    "regression": "linear",
}


def recipe(task: str, data: dict[str, Any], model: str = "rnn") -> Recipe:
    return Recipe.model_validate(
        {"name": "t", "task": task, "model": {"name": model}, "data": data}
    )


def plan(world: int, batch: int, micro: int) -> Plan:
    return Plan("ddp", "none", "fp32", world, batch, micro, "none", False)


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(n, dtype=np.uint64), n, key(seed, epoch))
    assert sorted(order.tolist()) == list(range(n))


def test_the_order_is_fixed_for_all_time() -> None:
    """A change here would make every old checkpoint continue with other samples."""
    assert samples_at(range(6, 16), 10, 7) == [7, 0, 9, 8, 6, 3, 2, 0, 9, 8]


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=3))
def test_a_key_is_made_as_the_numbers_of_many_positions_are(parts: list[int]) -> None:
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    assert key(*parts) == state[0]


def test_the_order_looks_random() -> None:
    """Over seeds every sample is equally often in each tenth of the epoch (chi-squared).

    There are 9 degrees of freedom.
    """
    n, seeds = 50, 4000
    places = np.zeros((n, 10))
    for seed in range(seeds):
        order = permute(np.arange(n, dtype=np.uint64), n, key(seed, 0)).astype(int)
        places[order, np.arange(n) * 10 // n] += 1
    chi2 = ((places - seeds / 10) ** 2 / (seeds / 10)).sum(1)
    assert chi2.mean() < 11
    assert chi2.max() < 40


@given(st.integers(1, 7), st.integers(1, 40), st.integers(1, 9))
def test_ranks_and_micro_batches_cut_the_global_batch_exactly(
    world: int, batch: int, micro: int
) -> None:
    batch = max(batch, world)
    p = plan(world, batch, min(micro, -(-batch // world)))
    of_ranks = [p.micro_batches(rank) for rank in range(world)]
    assert {len(micro_batches) for micro_batches in of_ranks} == {p.accumulation}
    micro_batches = list(chain(*of_ranks))
    assert list(chain(*micro_batches)) == list(range(batch))
    assert max(len(micro_batch) for micro_batch in micro_batches) <= p.micro_batch


class Numbers:
    """Examples that are their own index."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": 100.0 * index + torch.arange(16.0).view(1, 4, 4), "label": index}


class Unreadable(Numbers):
    """None of them can be read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise BadSampleError(f"sample {index} is broken")


class Holed(Numbers):
    """Every third of them cannot be read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index % 3 == 0:
            raise BadSampleError(f"sample {index} is broken")
        return super().__getitem__(index)


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    labels = torch.tensor([e["label"] for e in examples])
    return {"labels": labels, "pixel_values": torch.stack([e["image"] for e in examples])}


def stream(
    plan: Plan, rank: int, first: int, augment: Any = None, workers: int = 0, examples: Any = None
) -> Any:
    """train_batches over Numbers, seed 5."""
    data = {"train": "digits", "workers": workers, "augment": augment or {}}
    settings = recipe("image_classification", data, "cnn").model_copy(update={"seed": 5})
    return train_batches(examples or Numbers(), collate, settings, plan, rank, first)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_samples_of_a_step_do_not_depend_on_ranks_or_workers_or_where_one_starts(
    world: int, workers: int
) -> None:
    seen: list[list[int]] = [[] for _ in range(4)]
    for rank in range(world):
        micro_batches = stream(plan(world, 10, 3), rank, 20, workers=workers)
        for step in range(4):
            for micro_batch in next(micro_batches):
                labels = micro_batch.batch["labels"].tolist()
                assert labels == list(micro_batch.samples)
                if micro_batch.has_samples:
                    seen[step] += labels
    assert seen == [samples_at(range((2 + s) * 10, (3 + s) * 10), 23, 5) for s in range(4)]


@pytest.mark.parametrize(("micro_batch", "fetched"), [(1, 12), (5, 4)])
def test_workers_fetch_a_whole_step_ahead(
    micro_batch: int, fetched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def loader(*_: Any, **settings: Any) -> list[Any]:
        asked.update(settings)
        return [SimpleNamespace(batch={"labels": 0})] * 10

    monkeypatch.setattr(data_loader, "DataLoader", loader)
    assert len(next(stream(plan(1, 10, micro_batch), 0, 0, workers=2))) == 10 // micro_batch
    assert asked["num_workers"] * asked["prefetch_factor"] == fetched


def test_augmentation_depends_on_the_position_alone() -> None:
    images = []
    for world, micro in ((1, 10), (2, 2)):
        batches = []
        for rank in range(world):
            augment = {"crop": 1, "flip": True}
            for micro_batch in next(stream(plan(world, 10, micro), rank, 0, augment)):
                if micro_batch.has_samples:
                    batches.append(micro_batch.batch["pixel_values"])
        images.append(torch.cat(batches))
    assert torch.equal(*images)
    patterns = {tuple((image % 100).flatten().tolist()) for image in images[0]}
    assert len(patterns) > 3, "all shifted alike"


def test_a_crop_is_a_shift_with_the_border_repeated() -> None:
    image = torch.arange(6.0).view(1, 1, 2, 3)
    moved = shifted(image.expand(2, -1, -1, -1), np.array([[1, 0], [-1, -1]]), largest=1)
    assert moved[0, 0].tolist() == [[0, 0, 1], [3, 3, 4]]
    assert moved[1, 0].tolist() == [[4, 5, 5], [4, 5, 5]]


def test_what_is_read_without_scikit_learn_is_what_it_would_return() -> None:
    digits = load_digits()
    records = list(BUILT_IN["digits"].open("image_classification").records())
    images = np.stack([record["image"] for record in records])
    assert (images == (digits.images * (255 / 16)).round()).all()
    assert [int(record["label"]) for record in records] == digits.target.tolist()
    tumours = load_breast_cancer()
    table = BUILT_IN["breast-cancer"].open("tabular_classification").records()
    labels = table.pop("label")
    assert (table.to_numpy() == tumours.data).all()
    assert list(table) == [name.replace(" ", "_") for name in tumours.feature_names]
    assert labels.tolist() == tumours.target_names[tumours.target].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_cannot_be_read_are_left_out_and_ranks_stay_aligned(workers: int) -> None:
    samples: list[int] = []
    unreadable: list[str] = []
    for rank in range(2):
        micro_batches = next(stream(plan(2, 12, 1), rank, 0, workers=workers, examples=Holed()))
        assert len(micro_batches) == 6, "as many forward passes as without them"
        for micro_batch in micro_batches:
            unreadable += micro_batch.unreadable
            if micro_batch.has_samples:
                samples += micro_batch.samples
    expected = samples_at(range(12), 23, 5)
    assert samples == [index for index in expected if index % 3]
    assert unreadable == [f"sample {index} is broken" for index in expected if index % 3 == 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_that_cannot_be_read_at_all_any_more_is_a_failure(workers: int) -> None:
    batches = stream(plan(1, 4, 2), 0, 0, workers=workers, examples=Unreadable())
    with pytest.raises(TrainingFailed, match=r"none of the 23 training samples can be read"):
        next(batches)


@pytest.mark.parametrize("world", [1, 2, 3, 24])
def test_evaluation_sees_every_example_once(world: int) -> None:
    seen: list[int] = []
    forward_passes = set()
    for rank in range(world):
        micro_batches = list(eval_batches(Numbers(), collate, plan(world, 24, 4), rank))
        forward_passes.add(len(micro_batches))
        for micro_batch in micro_batches:
            if micro_batch.has_samples:
                seen += micro_batch.batch["labels"].tolist()
    assert sorted(seen) == list(range(23))
    assert len(forward_passes) == 1, "ranks must run the same number of forward passes"


def test_packed_text_predicts_every_token_once_and_splits_by_document(tmp_path: Path) -> None:
    texts = {f"doc{i}.txt": f"document {i} " * (i + 1) for i in range(40)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    prepared = prepare(
        recipe("causal_lm", {"train": f"{tmp_path}/*.txt", "tokenizer": "bytes", "seq_len": 32})
    )
    task = TASKS["causal_lm"]("causal_lm", prepared)
    decoded = ""
    for examples in (prepared.train, prepared.eval):
        ids = [int(t) for i in range(len(examples)) for t in examples[i]["tokens"][1:]]
        decoded += prepared.tokenizer.decode(ids)
        weight = sum(task.num_targets(task.collate([examples[i]])) for i in range(len(examples)))
        assert weight == len(ids)
    documents = [text for text in decoded.split("<eos>") if text]
    assert sorted(documents) == sorted(texts.values())
    held = [int(t) for i in range(len(prepared.eval)) for t in prepared.eval[i]["tokens"][1:]]
    assert prepared.eval_bytes == len(prepared.tokenizer.decode(held).replace("<eos>", ""))


def test_the_cache_is_made_once_and_again_when_a_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"body": f"text number {i}", "kind": "odd" if i % 2 else "even"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = {
        "train": str(file),
        "columns": {"text": "body", "label": "kind"},
        "tokenizer": {"vocab_size": 300},
        "seq_len": 16,
    }
    first = prepare(recipe("text_classification", data))
    assert first.classes == ["even", "odd"]
    assert len(first.train) + len(first.eval) == 60
    again = prepare(recipe("text_classification", data))
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    file.write_text(file.read_text() + '\n{"body": "one more", "kind": "third"}')
    assert prepare(recipe("text_classification", data)).classes == ["even", "odd", "third"]


def test_a_lone_text_file_can_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {i} of the book\n" for i in range(900)))
    prepared = prepare(
        recipe(
            "causal_lm", {"train": str(tmp_path / "book.txt"), "tokenizer": "bytes", "seq_len": 32}
        )
    )
    assert len(prepared.train) > 5 * len(prepared.eval) > 0


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_standardised_by_the_training_part(kind: str, tmp_path: Path) -> None:
    import pandas

    table = pandas.DataFrame(
        {"a": np.arange(50.0), "b": np.ones(50), "y": np.arange(50.0) * 2, "note": ["x"] * 50}
    )
    getattr(table, f"to_{kind}")(tmp_path / f"t.{kind}", index=False)
    prepared = prepare(
        recipe(
            "regression", {"train": f"{tmp_path}/t.{kind}", "columns": {"target": "y"}}, "linear"
        )
    )
    rows = np.stack([prepared.train[i]["features"] for i in range(len(prepared.train))])
    assert prepared.features == 2
    assert rows[:, 0].mean() == pytest.approx(0, abs=1e-5)
    assert rows[:, 0].std() == pytest.approx(1, abs=1e-5)
    assert np.isfinite(rows).all(), "a constant column must not divide by zero"


def picture(path: Path, shade: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path)


def test_an_image_folder_names_its_classes(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / ("dark" if i % 2 else "light") / f"{i}.png", i)
    prepared = prepare(
        recipe(
            "image_classification",
            {"train": str(tmp_path), "image_size": 8, "eval_fraction": 0.3},
            "cnn",
        )
    )
    assert prepared.classes == ["dark", "light"]
    assert prepared.image == (3, 8, 8)
    assert prepared.train[0]["image"].shape == (3, 8, 8)


def broken_folder(tmp_path: Path) -> dict[str, Any]:
    for i in range(6):
        picture(tmp_path / "a" / f"{i}.png", i)
    picture(tmp_path / "b" / "1.png", 9)
    (tmp_path / "a" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    return {"train": str(tmp_path), "image_size": 8, "eval_fraction": 0.4}


def two_sizes(tmp_path: Path) -> dict[str, Any]:
    for i in range(6):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i, (8 + i, 8))
    return {"train": str(tmp_path), "eval_fraction": 0.4}


def one_class(tmp_path: Path) -> dict[str, Any]:
    for i in range(4):
        picture(tmp_path / "a" / f"{i}.png", i)
    return {"train": str(tmp_path)}


def empty_file(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "empty.txt").write_text("")
    return {"train": str(tmp_path / "empty.txt"), "tokenizer": "bytes"}


def one_document(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "one.txt").write_text("only one document")
    return {"train": str(tmp_path / "*.txt"), "tokenizer": "bytes"}


def no_target(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "t.csv").write_text("x,target\n1,2\n3,\n5,6\n")
    return {"train": str(tmp_path / "t.csv"), "eval_fraction": 0.5}


def wrong_columns(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}')
    return {"train": str(tmp_path / "a.jsonl")}


def not_json(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ')
    return {"train": str(tmp_path / "a.jsonl")}


def latin1(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    return {"train": str(tmp_path / "a.txt")}


def other_task(_: Path) -> dict[str, Any]:
    return {"train": "diabetes"}


def unknown_field(_: Path) -> dict[str, Any]:
    return {"train": "python-stdlib", "columns": {"txt": "body"}}


def no_files(tmp_path: Path) -> dict[str, Any]:
    return {"train": f"{tmp_path}/*.txt"}


def no_such_set(_: Path) -> dict[str, Any]:
    return {"train": "no-such-set-anywhere"}


def no_tokenizer(tmp_path: Path) -> dict[str, Any]:
    return {"train": "python-stdlib", "tokenizer": str(tmp_path)}


@pytest.mark.parametrize(
    ("task", "make", "expected"),
    [
        ("image_classification", broken_folder, "does not decode"),
        ("image_classification", two_sizes, "image_size"),
        ("image_classification", one_class, "no classes found"),
        ("image_classification", other_task, "data.train=diabetes does not serve task"),
        ("causal_lm", empty_file, "nothing is left to hold out: data.train has 1 record"),
        ("causal_lm", one_document, "nothing is left to train on: data.train has 1 record"),
        ("causal_lm", unknown_field, "has no such field"),
        ("regression", no_target, "nothing, or not a finite number"),
        ("causal_lm", wrong_columns, "has no column text; it has: body"),
        ("causal_lm", not_json, "cannot be read as json"),
        ("causal_lm", latin1, "not UTF-8"),
        ("causal_lm", no_files, "data.train: no file matches"),
        ("image_classification", no_files, "try:      data.train=digits"),
        ("causal_lm", no_such_set, "and the hub cannot be reached"),
        ("causal_lm", no_such_set, "data.train: no data set 'no-such-set-anywhere'"),
        ("causal_lm", no_tokenizer, "no tokenizer at"),
        ("seq2seq", latin1, "no fields for task seq2seq"),
    ],
)
def test_bad_data_is_explained(task: str, make: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(recipe(task, make(tmp_path), MODEL_FOR_TASK[task]))
    assert expected in str(caught.value)
    assert "try:" in str(caught.value) or "expected:" in str(caught.value)


def null_text(tmp_path: Path) -> dict[str, Any]:
    lines = [{"text": f"text number {i}"} for i in range(20)] + [{"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"train": str(tmp_path / "a.jsonl"), "eval_fraction": 0.5}


def torn_image(tmp_path: Path) -> dict[str, Any]:
    for i in range(12):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", i)
    whole = tmp_path / "a" / "0.png"
    whole.write_bytes(whole.read_bytes()[:-30])
    return {"train": str(tmp_path), "eval_fraction": 0.4}


def missing_cell(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "t.csv").write_text(
        "x,target\n" + "\n".join(f"{i},{i}" for i in range(20)) + "\n3,\n"
    )
    return {"train": str(tmp_path / "t.csv"), "eval_fraction": 0.4}


@pytest.mark.parametrize(
    ("task", "make", "count", "name"),
    [
        ("causal_lm", null_text, 20, "record 20 of data.train: text is NoneType"),
        ("image_classification", torn_image, 11, "image 0 does not decode"),
        ("regression", missing_cell, 20, "row 20: nothing, or not a finite number"),
    ],
)
def test_unreadable_records_are_left_out_within_the_budget(
    task: str, make: Any, count: int, name: str, tmp_path: Path
) -> None:
    data, model = make(tmp_path), MODEL_FOR_TASK[task]
    with pytest.raises(RequestError, match=r"data\.max_unreadable=1 to leave it out"):
        prepare(recipe(task, data, model))
    prepared = prepare(recipe(task, data | {"max_unreadable": 1}, model))
    assert len(prepared.unreadable) == 1
    assert name in prepared.unreadable[0]
    if task != "causal_lm":
        assert len(prepared.train) + len(prepared.eval) == count


def sound_text(folder: Path) -> str:
    folder.mkdir()
    (folder / "book.txt").write_text("some text\n")
    return str(folder / "book.txt")


def sound_pairs(folder: Path) -> str:
    folder.mkdir()
    (folder / "pairs.jsonl").write_text('{"source": "a", "target": "b"}\n')
    return str(folder / "pairs.jsonl")


def sound_images(folder: Path) -> str:
    for i in range(4):
        picture(folder / "ab"[i % 2] / f"{i}.png", i)
    return str(folder)


def sound_table(folder: Path) -> str:
    folder.mkdir()
    (folder / "table.csv").write_text("x,target\n1,2\n3,4\n")
    return str(folder / "table.csv")


@pytest.mark.parametrize(
    ("task", "make", "expected"),
    [
        ("image_classification", other_task, "data.eval=diabetes does not serve task"),
        ("causal_lm", no_files, "data.eval: no file matches"),
        ("causal_lm", no_such_set, "data.eval: no data set 'no-such-set-anywhere'"),
        ("causal_lm", wrong_columns, "a.jsonl has no column text"),
        ("seq2seq", latin1, "data.eval: plain text files have no fields"),
        ("image_classification", torn_image, "image 0 of data.eval does not decode"),
        ("regression", missing_cell, "row 20 of data.eval: nothing, or not a finite number"),
        ("causal_lm", null_text, "record 20 of data.eval: text is NoneType"),
        ("causal_lm", empty_file, "data.eval is empty"),
        ("causal_lm", not_json, "data.eval: {broken}/a.jsonl: cannot be read as json"),
        ("causal_lm", latin1, "data.eval: {broken}/a.txt: not UTF-8"),
        ("image_classification", one_class, "data.eval: {broken}: no classes found"),
    ],
)
def test_an_error_about_data_eval_names_data_eval(
    task: str, make: Any, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    broken = make(tmp_path / "broken")["train"]
    sound = {
        "causal_lm": sound_text,
        "seq2seq": sound_pairs,
        "image_classification": sound_images,
        "regression": sound_table,
    }[task]
    data = {"train": sound(tmp_path / "sound"), "eval": broken, "tokenizer": "bytes"}
    with pytest.raises(RequestError) as caught:
        prepare(recipe(task, data, MODEL_FOR_TASK[task]))
    assert expected.format(broken=tmp_path / "broken") in str(caught.value)
    assert "data.train" not in str(caught.value)
    assert "eval_fraction" not in str(caught.value)


def test_every_task_has_one_spec_one_class_and_known_metrics() -> None:
    assert set(TASK_SPECS) == set(TASKS) == set(get_args(TaskName))
    for spec in TASK_SPECS.values():
        assert set(spec.metrics) < set(get_args(MetricName))
    assert [name for name in get_args(MetricName) if lower_is_better(name)] == [
        "loss",
        "perplexity",
        "bits_per_byte",
        "mse",
    ]
