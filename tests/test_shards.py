"""A checkpoint's pieces: written in one cut, read in another; and those that older code wrote."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bigtrain.checkpoint.format import write_tensors
from bigtrain.checkpoint.reader import load_checkpoint
from bigtrain.checkpoint.shards import Shards
from bigtrain.checkpoint.state import TrainState
from bigtrain.engine.base import Engine
from bigtrain.engine.ddp import DDPEngine
from bigtrain.engine.fragments import Fragment, Piece, flat_range, name_of_piece, parse_name
from bigtrain.engine.plan import Plan
from bigtrain.errors import RequestError, TrainingFailed

WHOLE = torch.arange(24.0).view(4, 6)
CUTS = {
    "whole": [Piece((0, 0), (4, 6))],
    "ranges": [flat_range(0, 10), flat_range(10, 13), flat_range(23, 1), flat_range(24, 0)],
    "rows": [Piece((0, 0), (1, 6)), Piece((1, 0), (3, 6))],
    "columns": [Piece((0, 0), (4, 2)), Piece((0, 2), (4, 4))],
    "quarters": [Piece((row, column), (2, 3)) for row in (0, 2) for column in (0, 3)],
}


def part_of(whole: Tensor, piece: Piece) -> Tensor:
    if piece.is_range:
        start = piece.offsets[0]
        return whole.reshape(-1)[start : start + piece.shape[0]]
    (top, left), (height, width) = piece.offsets, piece.shape
    return whole[top : top + height, left : left + width]


def save_cut(folder: Path, cut: list[Piece]) -> Shards:
    """One file per piece, as ranks write them."""
    for rank, piece in enumerate(cut):
        tensors = {name_of_piece("w", "weight", piece): part_of(WHOLE, piece).contiguous()}
        write_tensors(tensors, folder / f"rank-{rank:05d}.safetensors")
    return Shards(folder, {"w": [4, 6]})


@pytest.mark.parametrize(("written", "read"), list(product(CUTS, CUTS)))
def test_every_cut_is_read_back_into_every_other(written: str, read: str, tmp_path: Path) -> None:
    shards = save_cut(tmp_path, CUTS[written])
    for piece in CUTS[read]:
        into = torch.full(piece.shape, -1.0)
        shards.read("w", "weight", piece, into)
        assert torch.equal(into, part_of(WHOLE, piece))


@pytest.mark.parametrize("read", CUTS)
def test_a_missing_piece_is_refused(read: str, tmp_path: Path) -> None:
    shards = save_cut(tmp_path, CUTS["columns"][:1])
    with pytest.raises(RequestError, match="w has another size"):
        for piece in CUTS[read]:
            shards.read("w", "weight", piece, torch.empty(piece.shape))


def test_names_of_pieces() -> None:
    assert name_of_piece("layer.0.w", "exp_avg", flat_range(12, 3)) == "layer.0.w|exp_avg|12"
    assert name_of_piece("layer.0.w", "weight", Piece((0, 64), (8, 32))) == "layer.0.w|weight|0,64"
    assert name_of_piece("layer.0.w", "step", None) == "layer.0.w|step|scalar"
    for name in ("w|exp_avg|12", "w|weight|0,64", "w|step|scalar"):
        parameter, key, offsets = parse_name(name)
        piece = None if offsets is None else Piece(offsets, (1,) * len(offsets))
        assert name_of_piece(parameter, key, piece) == name


class ColumnParallel(DDPEngine):
    """A rank that holds half of the columns of a linear layer, as in tensor parallelism."""

    def fragments(self) -> list[Fragment]:
        weight = self.module.weight
        piece = Piece((0, 3 * self.rank), (4, 3))
        return [Fragment("weight", piece, weight.data, flat=weight, offset=0)]

    def _fragments_to_save(self) -> list[Fragment]:
        return self.fragments()


def make_engine(kind: type[DDPEngine], columns: int, rank: int = 0, world_size: int = 1) -> Engine:
    """An engine of one linear layer, AdamW and a buffer, without a process group."""
    engine = kind.__new__(kind)
    accelerator = SimpleNamespace(
        process_index=rank, num_processes=world_size, device=torch.device("cpu")
    )
    plan = Plan("ddp", "none", "fp32", world_size, 8, 8, "none", False)
    Engine.__init__(engine, plan, accelerator, clip_norm=0.0)
    torch.manual_seed(rank)
    engine.module = nn.Linear(columns, 4, bias=False)
    engine.module.register_buffer("running_mean", torch.tensor([0.5 + columns]))
    engine.optimizer = torch.optim.AdamW([{"params": engine.module.parameters()}], lr=0.1)
    return engine


def take_a_step(engine: Engine) -> None:
    engine.module(torch.arange(engine.module.in_features * 1.0)).square().sum().backward()
    engine.optimizer.step()


def test_an_engine_whose_ranks_hold_columns_moves_to_one_that_holds_all(tmp_path: Path) -> None:
    halves = [make_engine(ColumnParallel, 3, rank, world_size=2) for rank in range(2)]
    for rank, half in enumerate(halves):
        take_a_step(half)
        write_tensors(half.snapshot(), tmp_path / f"rank-{rank:05d}.safetensors")
    whole = make_engine(DDPEngine, 6)
    whole.restore(Shards(tmp_path, {"weight": [4, 6], "running_mean": [1]}))
    expected = torch.cat([half.module.weight for half in halves], dim=1)
    assert torch.equal(whole.module.weight, expected)
    for key in ("exp_avg", "exp_avg_sq"):
        states = [half.optimizer.state[half.module.weight][key] for half in halves]
        found = whole.optimizer.state[whole.module.weight][key]
        assert torch.equal(found, torch.cat(states, dim=1))
    assert whole.optimizer.state[whole.module.weight]["step"] == 1

    back = tmp_path / "back"
    back.mkdir()
    write_tensors(whole.snapshot(), back / "rank-00000.safetensors")
    other = make_engine(ColumnParallel, 3, rank=1, world_size=2)
    other.restore(Shards(back, {"weight": [4, 6], "running_mean": [1]}))
    assert torch.equal(other.module.weight, halves[1].module.weight)


def save_checkpoint(engine: Engine, folder: Path) -> None:
    """What a writer leaves, but for the hashes."""
    write_tensors(engine.snapshot(), folder / "rank-00000.safetensors")
    manifest = engine.facts() | {"shapes": engine.shapes()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "state.json").write_text(json.dumps(asdict(TrainState(data_size=100))))


def test_a_model_in_fp64_is_loaded_and_compared_in_fp64(tmp_path: Path) -> None:
    saved = make_engine(DDPEngine, 6)
    saved.module.double()
    # In fp32 it would be another number.
    saved.module.weight.data.fill_(1 / 3)
    save_checkpoint(saved, tmp_path)
    loaded = make_engine(DDPEngine, 6)
    loaded.module.double()
    load_checkpoint(loaded, tmp_path)
    assert torch.equal(loaded.module.weight, saved.module.weight)


def test_ddp_is_not_advised_where_it_is_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(make_engine(DDPEngine, 6), tmp_path)
    loaded = make_engine(DDPEngine, 6)
    # A load that fills the weights with something else.
    monkeypatch.setattr(loaded, "restore", lambda *_: loaded.module.weight.data.fill_(7.0))
    with pytest.raises(TrainingFailed, match="a forward pass would use") as raised:
        load_checkpoint(loaded, tmp_path)
    assert "try:" not in str(raised.value)


def test_a_manifest_without_a_fact_that_is_new_loads(tmp_path: Path) -> None:
    """What the checkpoint does not say of itself counts as unchanged."""
    engine = make_engine(DDPEngine, 6)
    take_a_step(engine)
    write_tensors(engine.snapshot(), tmp_path / "rank-00000.safetensors")
    manifest = engine.facts() | {"engine": "zero1", "shapes": engine.shapes()}
    del manifest["precision"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "state.json").write_text(json.dumps(asdict(TrainState(data_size=100))))
    restored = load_checkpoint(make_engine(DDPEngine, 6), tmp_path)
    assert restored.moved == "engine zero1 → ddp"


def test_a_checkpoint_of_the_first_form_loads(tmp_path: Path) -> None:
    """Two ranks' ranges of a parameter, as the first versions named and described them."""
    weight = torch.arange(24.0)
    first = {
        "weight|weight|0": weight[:10],
        "weight|exp_avg|0": weight[:10] / 2,
        "weight|exp_avg_sq|0": weight[:10] / 4,
        "weight|step|scalar": torch.tensor(7.0),
        "running_mean|buffer|scalar": torch.tensor([3.5]),
    }
    second = {
        "weight|weight|10": weight[10:],
        "weight|exp_avg|10": weight[10:] / 2,
        "weight|exp_avg_sq|10": weight[10:] / 4,
        "weight|step|scalar": torch.tensor(7.0),
    }
    save_file(first, tmp_path / "rank-00000.safetensors")
    save_file(second, tmp_path / "rank-00001.safetensors")
    manifest = {
        "engine": "zero2",
        "world_size": 2,
        "precision": "fp32",
        "optimizer": "AdamW",
        "offload": "none",
        "shapes": {"weight": [4, 6], "running_mean": [1]},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    state = {
        **{"step": 7, "applied": 6, "samples": 56, "weight": 56, "skips": 1, "rewinds": 0},
        **{"bad": ["a.png"], "data_size": 100, "recent": [1.5], "evaluated": 5},
        **{"results": {"loss": 1.25}, "best": None, "best_step": 0, "best_metric": None},
        "wandb_id": "",
    }
    since = {"evaluations_since_best": 0, "evaluations_since_decay": 0, "rate_decays": 0}
    (tmp_path / "state.json").write_text(json.dumps(state))
    engine = make_engine(DDPEngine, 6)
    restored = load_checkpoint(engine, tmp_path)
    assert vars(restored.state) == state | since
    assert restored.moved == "engine zero2 → ddp, world_size 2 → 1"
    assert torch.equal(engine.module.weight.data.view(-1), weight)
    assert engine.module.running_mean == 3.5
    optimizer_state = engine.optimizer.state[engine.module.weight]
    assert torch.equal(optimizer_state["exp_avg"].view(-1), weight / 2)
    assert torch.equal(optimizer_state["exp_avg_sq"].view(-1), weight / 4)
    assert optimizer_state["step"] == 7
