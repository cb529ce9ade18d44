"""Promise 1: the loss depends on neither engine, ranks, micro-batch nor accumulation.

Every case is a real run of the real loop on real ranks; the judge is a plain PyTorch loop written
here.
"""

import json
import re
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import torchrun
from distributed_cases import (
    GLOBAL_BATCH,
    MODELS,
    data_for,
    recipe_for,
    sample_ids,
    write_export,
)

from bigtrain.api import load_model
from bigtrain.models.build import build_model
from bigtrain.runs.step_shares import STEP_PARTS, column_of

# The first test waits for all worlds: three minutes on a quiet machine.
pytestmark = pytest.mark.timeout(1500)
STEPS = 8
PARTS_OF_A_STEP = ["parts/ddp", "parts/zero2"]
LAZY = ["lazy/adamw", "lazy/sgd", "lazy/sgd/momentum", "lazy/rmsprop"]
ENGINES = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "zero1"},
    "zero2": {"kind": "zero2"},
    "zero3": {"kind": "zero3"},
    "zero1-offload": {"kind": "zero1", "offload": "optimizer"},
    "zero2-offload": {"kind": "zero2", "offload": "optimizer"},
    "zero3-offload": {"kind": "zero3", "offload": "params"},
}
# accumulation → micro-batch, for the larger share: 8 samples on two ranks, 15 on one
MICRO = {2: {1: 8, 2: 4, 3: 3, 4: 2}, 1: {1: GLOBAL_BATCH, 2: 8, 3: 5, 4: 4}}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


def _curves(world: int) -> dict[str, dict[str, Any]]:
    """The matrix: models × engines × precisions × accumulations."""
    cases = {}
    for model, engine, precision, steps in product(MODELS, ENGINES, TOLERANCE, MICRO[world]):
        if world == 1 and engine not in ("ddp", "zero3"):
            continue
        if steps in (2, 4) and (precision == "bf16" or model == "twice" or "offload" in engine):
            continue
        if engine in ("zero1-offload", "zero3-offload") and steps != 3:
            continue
        case = {
            "run": "exact",
            "model": model,
            "precision": precision,
            "micro_batch": MICRO[world][steps],
        }
        case["evaluate"] = (precision, steps) == ("fp32", 1) and engine in ("ddp", "zero3")
        cases[f"{world}/{model}/{engine}/{precision}/{steps}"] = case | ENGINES[engine]
    return cases


# The parameters of distributed_cases.Twice
GROUPS = {
    "embedding.*": {"lr_scale": 0.5},
    "block.1.*": {"frozen": True},
    "block.3.*": {"lr_scale": 0.1, "weight_decay": 0.01},
}
QAT = {"transformer": "int4", "cnn": "int8"}
RAMP = {
    "run": "exact",
    "model": "transformer",
    "precision": "fp32",
    "micro_batch": 3,
    "global_batch": {"0": 5, "2": 9, "5": 14},
    "optim": {"schedule": "cosine", "warmup_steps": 2},
}


def _deeds() -> dict[str, dict[str, Any]]:
    """What two ranks do besides: resume, skip, rewind, stop, start, and other optimizers."""
    cases = {}
    for engine, precision in product(ENGINES, TOLERANCE):
        case = {"model": "transformer", "precision": precision, "micro_batch": 3} | ENGINES[engine]
        cases[f"resume/{engine}/{precision}"] = case | {"run": "resume", "dropout": 0.2}
        cases[f"skip/{engine}/{precision}"] = case | {"run": "skip"}
    for name in LAZY:
        optim = {
            "name": name.split("/")[1],
            "momentum": 0.9 if name.endswith("momentum") else 0.0,
            "schedule": "cosine",
        }
        cases[name] = {
            "run": "lazy",
            "model": "cnn",
            "precision": "fp32",
            "micro_batch": 4,
            "kind": "ddp",
            "steps": 7,
            "optim": optim,
        }
    for name in PARTS_OF_A_STEP:
        case = {"run": "parts", "model": "cnn", "precision": "fp32", "micro_batch": 4}
        cases[name] = case | ENGINES[name.split("/")[1]]
    for engine, policy in product(("ddp", "zero2-offload", "zero3"), ("skip", "rewind")):
        case = {
            "run": "spike",
            "model": "rnn",
            "precision": "fp32",
            "micro_batch": 4,
            "on_spike": policy,
        }
        cases[f"spike/{engine}/{policy}"] = case | ENGINES[engine]
    for model, engine in product(MODELS, ("ddp", "zero1", "zero3")):
        case = {"run": "weights", "model": model, "precision": "fp32", "micro_batch": 8}
        cases[f"weights/{model}/{engine}"] = case | ENGINES[engine]
    for optimizer, engine in product(
        ("sgd", "adam", "rmsprop", "adagrad"), ("ddp", "zero2", "zero3")
    ):
        optim = {"name": optimizer, "l1": 1e-3, "lr": 1e-2} | (
            {"momentum": 0.9} if optimizer == "sgd" else {}
        )
        case = {
            "run": "exact",
            "model": "cnn",
            "precision": "fp32",
            "micro_batch": 4,
            "optim": optim,
        }
        cases[f"optim/{optimizer}/{engine}"] = case | ENGINES[engine]
    for engine in ("ddp", "zero1", "zero2", "zero3"):
        case = {"run": "rates", "model": "twice", "precision": "fp32", "micro_batch": 4}
        cases[f"rates/{engine}"] = case | ENGINES[engine]
        case = {"run": "groups", "model": "twice", "precision": "fp32", "micro_batch": 4}
        cases[f"groups/{engine}"] = case | ENGINES[engine] | {"optim": {"groups": GROUPS}}
    for engine in ("ddp", "zero2", "zero3"):
        cases[f"ramp/2/{engine}"] = RAMP | ENGINES[engine]
        cases[f"resume/{engine}/ramp"] = RAMP | ENGINES[engine] | {"run": "resume"}
    for engine in ("ddp", "zero2", "zero3"):
        case = {"run": "compress", "model": "cnn", "precision": "fp32", "micro_batch": 3}
        sharded = {"kept_whole": 0} if engine == "zero3" else {}
        cases[f"compress/{engine}"] = case | ENGINES[engine] | sharded
    for engine, model in product(("ddp", "zero2", "zero3"), QAT):
        case = {"model": model, "precision": "fp32", "micro_batch": 3} | ENGINES[engine]
        case |= {"start": {"qat": QAT[model]}} | ({"kept_whole": 0} if engine == "zero3" else {})
        sgd = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
        cases[f"qat/{model}/{engine}"] = case | {"run": "exact", "optim": sgd}
        if model == "transformer":
            cases[f"resume/{engine}/qat"] = case | {"run": "resume"}
    case = {"run": "exact", "model": "transformer", "precision": "fp32", "micro_batch": 3}
    cases["reduce in bf16"] = case | {"kind": "ddp", "reduce_dtype": "bf16"}
    sabotage = {"run": "sabotage", "model": "rnn", "precision": "fp32", "micro_batch": 4}
    cases["sabotage"] = sabotage | ENGINES["zero3"]
    cases["last_rank_fails"] = {"run": "last_rank_fails"}
    case = {"run": "stop_evaluation", "model": "cnn", "precision": "fp32", "micro_batch": 4}
    return cases | {"stop_evaluation": case | ENGINES["zero3"]}


def _in_use(world: int) -> dict[str, dict[str, Any]]:
    """The weights in use after a load: models of every sort × engines × precisions."""
    cases = {}
    models = ("transformer", "rnn", "cnn", "mixed")
    for model, engine, precision in product(models, ENGINES, TOLERANCE):
        # One rank holds everything whatever the model: one model stands for all.
        every_engine = world == 2 or (model, precision) == ("transformer", "fp32")
        if not every_engine and engine not in ("ddp", "zero3"):
            continue
        if precision == "bf16" and engine not in ("zero1", "zero3"):
            continue
        case = {"run": "in_use", "model": model, "precision": precision, "micro_batch": 8}
        cases[f"in_use/{world}/{model}/{engine}/{precision}"] = case | ENGINES[engine]
    none_whole = cases[f"in_use/{world}/mixed/zero3/fp32"] | {"kept_whole": 0}
    return cases | {f"in_use/{world}/mixed/zero3/none whole": none_whole}


def _layers() -> dict[str, dict[str, Any]]:
    """Compiled, or computed again in backward passes: model/precision/engine/how, with dropout."""
    hows: dict[str, dict[str, Any]] = {
        "plain": {},
        "full": {"activation_checkpointing": "full"},
        "every second": {"activation_checkpointing": 2},
        "selective": {"activation_checkpointing": "selective"},
        "compiled": {"compile": True},
        "compiled selective": {"compile": True, "activation_checkpointing": "selective"},
    }
    engines = ("ddp", "zero1", "zero2", "zero3")
    names = [f"transformer/fp32/ddp/{how}" for how in hows]
    names += [f"stack/fp32/{how}" for how in ("ddp/plain", "zero3/full", "zero3/selective")]
    names += [f"transformer/fp32/{engine}/full" for engine in engines[1:]]
    names += [f"transformer/fp32/{engine}/selective" for engine in engines[1:]]
    names += [f"transformer/fp32/{engine}/compiled" for engine in engines[1:3]]
    names += [f"transformer/bf16/{engine}/selective" for engine in engines]
    names += [f"transformer/bf16/{engine}/compiled selective" for engine in ("ddp", "zero2")]
    cases = {}
    for name in names:
        model, precision, engine, how = name.split("/")
        case = {"run": "exact", "model": model, "precision": precision, "micro_batch": 4}
        case |= {"kept_whole": 0} if engine == "zero3" else {}
        case |= {"dropout": 0.2} if model == "transformer" else {}
        cases[f"layers/{name}"] = case | {"steps": 4} | ENGINES[engine] | hows[how]
    return cases


LAYERS = _layers()
# 20 samples a step in pieces of 5: the same pieces on one rank and on two
DROPOUT = {
    "run": "exact",
    "model": "cnn",
    "precision": "fp32",
    "micro_batch": 5,
    "dropout": 0.3,
    "global_batch": 20,
}
DROPOUTS = {
    f"dropout/{n}/{kind}": DROPOUT | {"kind": kind}
    for n, kind in ((1, "ddp"), (2, "ddp"), (2, "zero3"))
}
# How often the host waits in a quiet step with three micro-batches: a number only goes down.
HOST_WAITS = json.loads((Path(__file__).parent / "host_waits.json").read_text())


def _waits() -> dict[str, dict[str, Any]]:
    cases = {}
    for name in HOST_WAITS:
        model, engine, precision = name.split("/")
        case = {"run": "waits", "model": model, "precision": precision, "micro_batch": MICRO[1][3]}
        cases[f"waits/{name}"] = case | ENGINES[engine]
    return cases


CASES = {
    1: _curves(1)
    | _in_use(1)
    | _waits()
    | {"ramp/1/ddp": RAMP | {"kind": "ddp"}}
    | {name: case for name, case in DROPOUTS.items() if "/1/" in name},
    2: _curves(2)
    | _in_use(2)
    | _deeds()
    | LAYERS
    | {name: case for name, case in DROPOUTS.items() if "/2/" in name},
}

SAVED = {"ddp": 1, "zero3": 1, "zero2": 2, "zero3-offload": 2}  # engine → ranks it is saved on


def _moves() -> dict[int, dict[str, dict[str, Any]]]:
    """Saved by one engine on one number of ranks, continued by each engine on one and on two."""
    moves: dict[int, dict[str, dict[str, Any]]] = {1: {}, 2: {}}
    common = {"model": "transformer", "precision": "fp32", "micro_batch": 3}
    for origin, ranks in SAVED.items():
        case = common | ENGINES[origin] | {"folder": f"../{origin}"}
        moves[ranks][f"save/{origin}"] = case | {"run": "save"}
    for origin, world, engine in product(SAVED, (1, 2), ENGINES):
        if world == 2 or engine in ("ddp", "zero3"):
            case = common | ENGINES[engine] | {"folder": f"../{origin}"}
            moves[world][f"go_on/{origin}/{world}/{engine}"] = case | {"run": "go_on"}
    return moves


MOVES = _moves()


class Results(dict[str, Any]):
    """Case → what it returned. A case that failed fails the tests that ask for it, no others."""

    def __getitem__(self, name: str) -> Any:
        result = super().__getitem__(name)
        assert not (isinstance(result, dict) and "error" in result), result["error"]
        return result


def selected_cases(items: list[pytest.Item]) -> set[str]:
    """The cases that the selected tests name in their parameters, and those that these build on."""
    names: set[str] = set()
    for item in items:
        if not isinstance(item, pytest.Function) or "results" not in item.fixturenames:
            continue
        for value in item.callspec.params.values():
            names.update([value] if isinstance(value, str) else value)
    saves = {f"save/{name.split('/')[1]}" for name in names if name.startswith("go_on/")}
    compared = {f"layers/{name.split('/')[1]}/fp32/ddp/plain" for name in names & set(LAYERS)}
    return names | saves | compared


def run_cases(world: int, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run cases in one process group of `world` ranks; case → result."""
    folder.mkdir(exist_ok=True)
    for left in folder.glob("rank-*.jsonl"):
        left.unlink()
    (folder / "cases.json").write_text(json.dumps(cases))
    program = str(Path(__file__).parent / "distributed_cases.py")
    arguments = [program, str(folder), str(folder / "cases.json")]
    done = torchrun(world, *arguments, cwd=folder, timeout=1200)
    ending = f"the ranks ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-6000:]}"
    results = {name: {"error": ending} for name in cases}
    failed: dict[str, Any] = {}  # an error of any rank is the case's result: the lowest rank's
    for file in sorted(folder.glob("rank-*.jsonl")):
        for line in file.read_text().splitlines():
            name, result = json.loads(line)
            if "error" in result:
                failed.setdefault(name, result)
            else:
                results[name] = result
    return results | failed


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """The cases of the selected tests, in as few process groups as can be."""
    selected = selected_cases(request.session.items)
    onward = {world: {} for world in MOVES}
    first = {world: dict(CASES[world]) for world in MOVES}
    for world, moves in MOVES.items():
        for name, case in moves.items():
            (onward if case["run"] == "go_on" else first)[world][name] = case
    base = tmp_path_factory.mktemp("worlds")
    found = Results()
    for world, cases in [(2, first[2]), (1, first[1] | onward[1]), (2, onward[2])]:
        asked = {name: case for name, case in cases.items() if name in selected}
        if asked:
            found |= run_cases(world, asked, base / f"world-{world}")
    return found


@cache
def reference(
    model: str, optimizer: str = "adamw", l1: float = 0.0
) -> tuple[list[float], list[float], list[float]]:
    """Losses, gradient norms and rates of a plain loop over whole global batches, in fp32 on one
    process.
    """
    torch.set_num_threads(1)
    case = {"model": model, "kind": "ddp", "precision": "fp32", "micro_batch": 1}
    prepared = data_for(model)
    net = build_model(recipe_for(case), prepared).train()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    rate = 5e-3 if optimizer == "adamw" else 1e-2
    make = {
        "adamw": "AdamW",
        "sgd": "SGD",
        "adam": "Adam",
        "rmsprop": "RMSprop",
        "adagrad": "Adagrad",
    }[optimizer]
    extra = {"momentum": 0.9} if optimizer == "sgd" else {"eps": 1e-8}
    optim = getattr(torch.optim, make)(groups, lr=rate, **extra)
    losses, norms = [], []
    for step in range(STEPS):
        total, weight = torch.zeros(()), 0
        for index in sample_ids(step):
            example = prepared.train[index]
            if model == "cnn":
                total = total + F.cross_entropy(
                    net(pixel_values=example["image"][None])[0], torch.tensor(example["label"])
                )
                weight += 1
            else:
                tokens = torch.from_numpy(example["tokens"])
                logits = net(input_ids=tokens[None, :-1])
                logits = getattr(logits, "logits", logits)[0]
                total = total + F.cross_entropy(logits, tokens[1:], reduction="sum")
                weight += len(tokens) - 1
        loss = total / weight
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        if l1:
            for parameter in matrices:
                assert parameter.grad is not None
                parameter.grad += l1 * parameter.detach().sign()
        optim.step()
        optim.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, [rate] * STEPS


EXACT = [*_curves(1), *_curves(2)]


@pytest.mark.parametrize("name", EXACT)
def test_loss_and_gradient_norm_equal_a_plain_loop(name: str, results: Results) -> None:
    _, model, _, precision, accumulation = name.split("/")
    losses, norms, _ = reference(model)
    lines = results[name]["lines"]
    assert results[name]["accumulation"] == int(accumulation)
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=TOLERANCE[precision])
    # a norm in bf16 is made of gradients that are each rounded to 8 bits
    assert [line["grad_norm"] for line in lines] == pytest.approx(
        norms, rel=1e-5 if precision == "fp32" else 5e-2
    )
    assert all(line["applied"] for line in lines)


@pytest.mark.parametrize("name", [name for name in CASES[2] if name.startswith("optim/")])
def test_every_optimizer_with_l1_and_l2_is_exact_when_sharded(name: str, results: Results) -> None:
    losses, norms, _ = reference("cnn", name.split("/")[1], 1e-3)
    assert [line["loss"] for line in results[name]["lines"]] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in results[name]["lines"]] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("name", ["reduce in bf16"])
def test_gradients_that_ranks_send_in_bf16_are_bf16s(name: str, results: Results) -> None:
    losses, norms, _ = reference("transformer")
    lines = results[name]["lines"]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=TOLERANCE["bf16"])
    found = [line["grad_norm"] for line in lines]
    assert found == pytest.approx(norms, rel=5e-2) and found != pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", ["last_rank_fails"])
def test_a_case_that_fails_on_the_last_rank_alone_fails(name: str, results: Results) -> None:
    with pytest.raises(AssertionError, match="rank 1: "):
        results[name]


EVALUATED = {
    model: [f"{run}/fp32/1" for run in (f"1/{model}/ddp", f"2/{model}/ddp", f"2/{model}/zero3")]
    for model in MODELS
}


@pytest.mark.parametrize("names", EVALUATED.values(), ids=EVALUATED)
def test_evaluation_counts_every_example_once_on_any_engine(
    names: list[str], results: Results
) -> None:
    found = [results[name]["eval"] for name in names]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES[2] if name.startswith("resume/")])
def test_resume_is_bit_exact(name: str, results: Results) -> None:
    assert results[name] == {"problems": [], "moved": "", "same_losses": True, "same_weights": True}


@pytest.mark.parametrize("name", [*_in_use(1), *_in_use(2)])
def test_after_a_load_forward_passes_use_the_weights_of_the_checkpoint(
    name: str, results: Results
) -> None:
    assert len(results[name]) == 6
    assert {when: wrong for when, wrong in results[name].items() if wrong} == {}


@pytest.mark.parametrize("name", ["sabotage"])
def test_a_load_that_leaves_old_weights_in_use_ends_the_run_on_every_rank(
    name: str, results: Results
) -> None:
    ends = results[name]["ends"]
    assert [code for code, _ in ends] == [3, 3]
    assert ends[0] == ends[1], "all ranks say the same"
    hash_of_8_bytes = "[0-9a-f]{16}"
    assert re.search(
        f"on rank 0: a forward pass would use {hash_of_8_bytes}, "
        f"and .*/step-00000001 has {hash_of_8_bytes}",
        ends[0][1],
    )


@pytest.mark.parametrize(
    "name", [name for cases in MOVES.values() for name in cases if name.startswith("go_on/")]
)
def test_a_checkpoint_goes_on_on_any_engine_and_any_number_of_ranks(
    name: str, results: Results
) -> None:
    _, origin, world, _ = name.split("/")
    losses, norms, _ = reference("transformer")
    lines = results[name]["lines"]
    assert [line["step"] for line in lines] == [5, 6, 7, 8]
    assert [line["loss"] for line in lines] == pytest.approx(losses[4:], rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms[4:], rel=1e-4)
    assert (f"world_size {SAVED[origin]} → {world}" in results[name]["moved"]) == (
        SAVED[origin] != int(world)
    )


@pytest.mark.parametrize("name", [name for name in CASES[2] if name.startswith("skip/")])
def test_all_ranks_skip_a_step_that_is_not_finite(name: str, results: Results) -> None:
    assert results[name] == {"applied": [True, False, True], "finite": True, "count": 2}


@pytest.mark.parametrize("name", LAZY)
def test_a_step_that_logs_nothing_changes_nothing_and_does_not_wait(
    name: str, results: Results
) -> None:
    found = results[name]
    assert found["lines"] and found["weights"] and found["applied"] == 6
    assert found["said"] == ["step_skipped"], "the step that no line of metrics tells of"
    assert found["written"] == [0, 1, 2, 3, 4, 5, 7], "a line is written while the next step runs"
    # The others have no kernel that leaves a step out by itself.
    if name in ("lazy/adamw", "lazy/sgd"):
        assert found["reads"][1:6] == found["reads"][7:] == [0] * 5, (
            "beyond the first step, in which the data loader draws its seed"
        )


@pytest.mark.parametrize("name", PARTS_OF_A_STEP)
def test_where_a_step_went_is_seen_and_adds_up(name: str, results: Results) -> None:
    lines = results[name]["seconds"]
    assert len(lines) == 4
    for line in lines:
        assert sum(line[column_of(part)] for part in STEP_PARTS) == pytest.approx(line["seconds"])
        assert line["seconds_data"] >= 0.02
        assert all(line[column_of(part)] > 0 for part in ("forward", "backward", "optimizer"))
    assert max(line["seconds_communication"] for line in lines[1:]) > 0.04, (
        "rank 0 waits for the data of rank 1"
    )


@pytest.mark.parametrize("name", _waits())
def test_the_host_waits_no_more_often_than_it_did(name: str, results: Results) -> None:
    assert results[name] == HOST_WAITS[name.removeprefix("waits/")], (
        "more: something new waits for the device; fewer: write it into tests/host_waits.json"
    )


SPIKES = {
    engine: [f"spike/{engine}/skip", f"spike/{engine}/rewind"]
    for engine in ("ddp", "zero2-offload", "zero3")
}


@pytest.mark.parametrize("names", SPIKES.values(), ids=SPIKES)
def test_a_loss_spike_is_skipped_or_rewound(names: list[str], results: Results) -> None:
    skip, rewind = (results[name] for name in names)
    assert skip["applied"] == rewind["applied"] == [True, False, True]
    assert skip["events"] == ["loss_spike"]
    assert skip["seen"] == [[1, 1], [2, 2], [3, 3]]  # (step, batches consumed)
    assert rewind["events"] == ["loss_spike", "rewound"]
    assert rewind["seen"] == [[1, 1], [1, 2], [2, 3]], (
        "the step is done again, with the data after the spike"
    )
    assert skip["count"] == rewind["count"] == 2


@pytest.mark.parametrize("name", ["stop_evaluation"])
def test_a_stop_within_an_evaluation_is_obeyed_by_all_ranks(name: str, results: Results) -> None:
    assert results[name] == {"none": [None, None]}


RATES = [f"rates/{engine}" for engine in ("ddp", "zero1", "zero2", "zero3")]


@pytest.mark.parametrize("name", RATES)
def test_a_group_of_parameters_has_a_rate_of_its_own(name: str, results: Results) -> None:
    found = results[name]
    matrices = ["embedding.weight", "block.1.weight", "block.3.weight"]
    others = ["block.0.weight", "block.0.bias", "block.1.bias", "block.3.bias"]
    assert found["names"] == [matrices, others]
    assert found["schedule"] == 5e-3
    assert found["rates"] == [2.5e-3, 0.0]
    # head.weight is the embedding's, tied
    assert found["moved"] == [*matrices, "head.weight"]


GROUPED = [f"groups/{engine}" for engine in ("ddp", "zero1", "zero2", "zero3")]


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_in_force_in_the_engine(name: str, results: Results) -> None:
    found = results[name]
    rate = 5e-3
    wanted = {
        "embedding.weight": [rate * 0.5, 0.1],
        "block.0.weight": [rate, 0.0],
        "block.0.bias": [rate, 0.0],
        "block.3.weight": [rate * 0.1, 0.01],
        "block.3.bias": [rate * 0.1, 0.01],
    }
    updated_by: dict[str, list[float]] = {}
    for of_rank in found["updated_by"]:
        updated_by |= of_rank
    assert updated_by == wanted
    assert found["moved"] == [*wanted, "head.weight"], "tied; and what is frozen stays as it was"
    counted = {tuple(row.items()) for row in found["in_force"]}
    assert counted == {tuple(row.items()) for row in results["groups/ddp"]["in_force"]}
    assert {"frozen": True, "parameters": 2, "elements": 32 * 128 + 128} in found["in_force"]
    losses = [line["loss"] for line in results["groups/ddp"]["lines"]]
    assert [line["loss"] for line in found["lines"]] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "names", [["ramp/1/ddp", "ramp/2/ddp", "ramp/2/zero2", "ramp/2/zero3"]], ids=["ramp"]
)
def test_a_growing_batch_has_one_curve(names: list[str], results: Results) -> None:
    first = results[names[0]]["lines"]
    for name in names[1:]:
        lines = results[name]["lines"]
        for key in ("samples_digest", "lr", "weight"):
            assert [line[key] for line in lines] == [line[key] for line in first]
        losses = [line["loss"] for line in first]
        assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("names", [list(DROPOUTS)], ids=["dropout"])
def test_dropout_does_not_depend_on_the_ranks_when_the_micro_batches_are_the_same(
    names: list[str], results: Results
) -> None:
    curves = [[line["loss"] for line in results[name]["lines"]] for name in names]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


ROUNDED = {
    model: [f"qat/{model}/{engine}" for engine in ("ddp", "zero2", "zero3")] for model in QAT
}


@pytest.mark.parametrize("names", ROUNDED.values(), ids=ROUNDED)
def test_rounded_weights_have_one_curve_on_every_engine(names: list[str], results: Results) -> None:
    """To 1e-5 until a weight's last bits decide to which side it is rounded, then to 5e-3."""
    for key in ("loss", "grad_norm"):
        curves = [[line[key] for line in results[name]["lines"]] for name in names]
        assert len(curves[0]) == STEPS
        for curve in curves[1:]:
            assert curve[:2] == pytest.approx(curves[0][:2], rel=1e-5)
            scale = 1 if key == "loss" else 10
            assert curve == pytest.approx(curves[0], rel=5e-3 * scale)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_or_computed_again_the_curve_is_the_same(name: str, results: Results) -> None:
    _, model, precision, _, _ = name.split("/")
    plain = results[f"layers/{model}/fp32/ddp/plain"]["lines"]
    lines = results[name]["lines"]
    tolerance = TOLERANCE[precision]
    losses = [line["loss"] for line in plain]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=tolerance)
    norms = [line["grad_norm"] for line in plain]
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=10 * tolerance)
    assert (results[name]["compiled_graphs"] > 0) == bool(LAYERS[name].get("compile"))


STARTS = {
    model: [f"weights/{model}/{kind}" for kind in ("ddp", "zero1", "zero3")] for model in MODELS
}


@pytest.mark.parametrize("names", STARTS.values(), ids=STARTS)
def test_starting_weights_do_not_depend_on_the_engine(names: list[str], results: Results) -> None:
    ddp, zero1, zero3 = (results[name] for name in names)
    assert zero1 == ddp
    assert zero3 == ddp


def pruned_and_taught(folder: Path) -> list[float]:
    """Losses of a plain loop with masks that are multiplied in, and a teacher."""
    torch.set_num_threads(1)
    student, teacher = (load_model(write_export(folder / str(seed), seed)) for seed in (0, 1))
    student.train()
    matrices = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    magnitudes = torch.cat([p.detach().abs().flatten() for p in matrices])
    threshold = magnitudes.sort().values[len(magnitudes) // 2 - 1]
    masks = [p.detach().abs() > threshold for p in matrices]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optim = torch.optim.AdamW(groups, lr=5e-3)
    examples, losses = data_for("cnn").train, []
    for step in range(STEPS):
        with torch.no_grad():
            for parameter, mask in zip(matrices, masks, strict=True):
                parameter.mul_(mask)
        batch = [examples[index] for index in sample_ids(step)]
        images = torch.stack([example["image"] for example in batch])
        labels = torch.tensor([example["label"] for example in batch])
        logits = student(pixel_values=images)
        with torch.no_grad():
            taught = (teacher(pixel_values=images) / 3.0).softmax(-1)
        cross_entropy = F.cross_entropy(logits, labels)
        divergence = (taught * (taught.log() - (logits / 3.0).log_softmax(-1))).sum(-1).mean()
        loss = 0.3 * cross_entropy + 0.7 * 9.0 * divergence
        loss.backward()
        for parameter, mask in zip(matrices, masks, strict=True):
            parameter.grad *= mask  # type: ignore[operator]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optim.step()
        optim.zero_grad()
        losses.append(float(loss.detach()))
    return losses


COMPRESSED = [name for name in CASES[2] if name.startswith("compress/")]


@pytest.mark.parametrize("name", COMPRESSED)
def test_pruned_weights_stay_zero_and_a_teacher_is_exact_on_every_engine(
    name: str, results: Results, tmp_path: Path
) -> None:
    found = results[name]
    assert [line["loss"] for line in found["lines"]] == pytest.approx(
        pruned_and_taught(tmp_path), rel=1e-5
    )
    zeros = {name: count for name, count in found["zeros"].items() if count}
    assert set(zeros) == {"features.0.weight", "features.4.weight", "classifier.weight"}
    assert sum(zeros.values()) == (72 + 1152 + 640) // 2
    assert found["same_losses"] and found["same_weights"]
