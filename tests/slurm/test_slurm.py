"""Promise 2 on a real Slurm of two nodes: what ends a job early, and how the run goes on. `make
slurm` runs it.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, missing
from test_submit import CASES, script

from bigtrain.runs.directory import RunDir, asset
from bigtrain.runs.metrics_file import read_metrics

if missing() and "BIGTRAIN_NO_SKIPS" in os.environ:
    raise RuntimeError(missing())
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
TRAIN = str(asset("slurm", "train.sbatch"))
NODES = ["--nodes=2", "--ntasks-per-node=1"]
RECIPE = ["digits-cnn", "engine.kind=zero2", "engine.micro_batch=8", "track.wandb=offline"]
RECIPE += ["train.steps=400", "train.eval_every=400", "train.checkpoint_every=50"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of the same recipe under torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "bigtrain",
        "train",
        *RECIPE,
    ]
    subprocess.run([sys.executable, *launch], cwd=folder, check=True, capture_output=True)
    return losses(folder)


def losses(folder: Path) -> dict[int, float]:
    lines = read_metrics(folder / "runs" / "digits-cnn" / "metrics.jsonl", "train")
    return {line["step"]: line["loss"] for line in lines}


def environment(folder: Path, **more: str) -> dict[str, str]:
    """A set-up file, as a user would name one: here it brings the tests' interpreter."""
    setup = folder / "setup.sh"
    setup.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    return {"BIGTRAIN_SETUP": str(setup), "OMP_NUM_THREADS": "1"} | more


def submit(
    cluster: Cluster, folder: Path, *options: str, overrides: tuple[str, ...] = (), **more: str
) -> str:
    arguments = [*NODES, "--output=job.log", *options, TRAIN, *RECIPE, *overrides]
    return cluster.submit(*arguments, cwd=folder, **environment(folder, **more))


def reached(folder: Path, step: int) -> bool:
    return max(losses(folder), default=0) >= step


def log(folder: Path) -> str:
    return (folder / "job.log").read_text()


def went_on(folder: Path, undisturbed: dict[int, float]) -> None:
    """The whole curve is the undisturbed one's, to the bit; and the run is one run in W&B."""
    assert losses(folder) == undisturbed
    run = RunDir(folder / "runs" / "digits-cnn")
    assert json.loads(run.summary.read_text())["status"] == "finished"
    assert {line["event"] for line in read_metrics(run.metrics, "event")} >= {"resumed"}
    names = {path.name.rsplit("-", 1)[1] for path in (run.path / "wandb").glob("offline-run-*")}
    assert len(names) == 1, "one id, however many segments"


def test_a_job_over_two_nodes_trains_and_finishes(
    cluster: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path)
    assert cluster.finish(job) == "COMPLETED", log(tmp_path)
    assert losses(tmp_path) == undisturbed
    effective = json.loads((tmp_path / "runs" / "digits-cnn" / "effective.json").read_text())
    assert effective["engine.world_size"]["value"] == 2


def test_a_preempted_job_saves_and_goes_on(
    cluster: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path)
    cluster.wait(lambda: reached(tmp_path, 60), 120, "step 60")
    urgent = cluster.submit(
        "--partition=high", *NODES, "--exclusive", "--wrap", "sleep 2", cwd=tmp_path
    )
    cluster.finish(urgent)
    assert cluster.finish(job) == "COMPLETED", log(tmp_path)
    went_on(tmp_path, undisturbed)
    assert "ended with 75; requeued (restart 1)" in log(tmp_path), "saved by itself, not killed"
    assert (
        len([line for line in log(tmp_path).splitlines() if "  stopped early  reason" in line]) == 1
    ), "all ranks at one step"


def test_a_killed_rank_is_requeued(
    cluster: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    once = tmp_path / "once.sh"  # only in the job's first life
    once.write_text('[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || export BIGTRAIN_FAULT=kill@1:130\n')
    setup = environment(tmp_path)["BIGTRAIN_SETUP"]
    once.write_text(once.read_text() + Path(setup).read_text())
    job = cluster.submit(
        *NODES,
        "--output=job.log",
        TRAIN,
        *RECIPE,
        cwd=tmp_path,
        BIGTRAIN_SETUP=str(once),
        OMP_NUM_THREADS="1",
    )
    assert cluster.finish(job) == "COMPLETED", log(tmp_path)
    went_on(tmp_path, undisturbed)


def test_a_lost_node_is_survived(
    cluster: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path)
    cluster.wait(lambda: reached(tmp_path, 60), 120, "step 60")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait(lambda: cluster.state(job) != "RUNNING", 60, "the job's end")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    assert cluster.finish(job) == "COMPLETED", log(tmp_path)
    went_on(tmp_path, undisturbed)


def test_the_wall_time_limit_is_survived(cluster: Cluster, tmp_path: Path) -> None:
    """A minute. Slurm looks every half minute, so the signal may come while the ranks still start:
    then they save at once.
    """
    longer = ("train.steps=100000", "train.eval_every=100000")
    job = submit(cluster, tmp_path, "--time=1", "--signal=USR1@45", overrides=longer)
    cluster.wait(
        lambda: (tmp_path / "job.log").exists() and "requeued (restart 1)" in log(tmp_path),
        120,
        "requeue",
    )
    first = max(losses(tmp_path))
    cluster.wait(lambda: cluster.state(job) == "PENDING", 60, "its place in the queue")
    cluster.run(
        "scontrol", "update", f"jobid={job}", "timelimit=10"
    )  # so that its second life gets somewhere
    time.sleep(4)  # its last life must be over everywhere, or the node refuses the next
    cluster.release(job)
    cluster.wait(lambda: reached(tmp_path, first + 100), 120, "a hundred more steps")
    cluster.run("scancel", job)
    cluster.finish(job)
    assert "ended with 75; requeued (restart 1)" in log(tmp_path), log(tmp_path)
    curve = losses(tmp_path)
    assert (
        len(
            {
                path.name.rsplit("-", 1)[1]
                for path in (tmp_path / "runs" / "digits-cnn" / "wandb").glob("offline-run-*")
            }
        )
        == 1
    )

    straight = tmp_path / "straight"
    straight.mkdir()
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "bigtrain",
        "train",
    ]
    control = subprocess.Popen(
        [*launch, *RECIPE, *longer],
        cwd=straight,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    cluster.wait(lambda: reached(straight, max(curve)), 120, "as many undisturbed steps")
    control.terminate()
    control.wait(60)
    assert curve == {step: loss for step, loss in losses(straight).items() if step in curve}


def test_one_task_of_an_array_is_requeued_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The last task has the number of the array: requeueing that would start its sibling too."""
    short = f"digits-cnn {' '.join(RECIPE[1:])} engine.kind=ddp"
    (tmp_path / "runs.txt").write_text(
        f"{short} name=a train.steps=100000\n{short} name=b train.steps=100000\n"
    )
    sweep = ["--array=1-2", "--output=job-%a.log", str(asset("slurm", "sweep.sbatch")), "runs.txt"]
    job = cluster.submit(*sweep, cwd=tmp_path, **environment(tmp_path))
    metrics = [tmp_path / "runs" / name / "metrics.jsonl" for name in ("a", "b")]
    cluster.wait(
        lambda: all(len(list(read_metrics(path, "train"))) > 20 for path in metrics),
        120,
        "both at work",
    )
    cluster.run("scancel", "--signal=USR1", f"{job}_2")
    cluster.wait(
        lambda: cluster.field(f"{job}_2", "Restarts") == "1", 60, "the second task's requeue"
    )
    assert cluster.field(f"{job}_1", "Restarts") == "0"
    assert cluster.state(f"{job}_1") == "RUNNING"
    cluster.run("scancel", job)
    cluster.finish(f"{job}_1")


def test_a_job_that_gains_nothing_stops_being_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, BIGTRAIN_FAULT="kill@1:3")
    assert cluster.finish(job, 240) == "FAILED", log(tmp_path)
    assert cluster.field(job, "ExitCode").startswith("3:"), log(tmp_path)
    assert "no checkpoint came of it" in log(tmp_path)
    assert int(cluster.field(job, "Restarts")) == 3


def test_a_wrong_request_is_never_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, overrides=("optim.learning_rate=1",))
    assert cluster.finish(job) == "FAILED"
    assert cluster.field(job, "ExitCode").startswith("2:"), log(tmp_path)
    assert "did you mean optim.lr?" in log(tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_second_job_for_the_same_run_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Side by side, each on one node."""
    long = ("train.steps=100000", "train.eval_every=100000")
    first = submit(cluster, tmp_path, "--nodes=1", overrides=long)
    cluster.wait(lambda: reached(tmp_path, 20), 120, "step 20")
    recipe = (tmp_path / "runs" / "digits-cnn" / "recipe.yaml").read_bytes()
    second = submit(
        cluster, tmp_path, "--nodes=1", "--output=second.log", overrides=(*long, "track.tags=[x]")
    )
    assert cluster.finish(second) == "FAILED"
    assert cluster.field(second, "ExitCode").startswith("2:")
    assert f"Slurm job {first}" in (tmp_path / "second.log").read_text()
    assert (tmp_path / "runs" / "digits-cnn" / "recipe.yaml").read_bytes() == recipe
    cluster.run("scancel", first)
    cluster.finish(first)


def test_a_hang_is_ended_named_and_requeued(
    cluster: Cluster, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """SIGSTOP of one rank in the job's first life."""
    once = tmp_path / "once.sh"
    setup = Path(environment(tmp_path)["BIGTRAIN_SETUP"])
    once.write_text(
        '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || export BIGTRAIN_FAULT=stop@1:130\n'
        + setup.read_text()
    )
    job = cluster.submit(
        *NODES,
        "--output=job.log",
        TRAIN,
        *RECIPE,
        "train.hang_timeout=5",
        cwd=tmp_path,
        BIGTRAIN_SETUP=str(once),
    )
    assert cluster.finish(job, 240) == "COMPLETED", log(tmp_path)
    (named,) = [line for line in log(tmp_path).splitlines() if "SILENT" in line]
    assert "rank 1: last seen at step" in named
    went_on(tmp_path, undisturbed)


def test_slurm_accepts_what_submit_writes(cluster: Cluster) -> None:
    for overrides in CASES.values():
        asked = script(overrides)
        done = subprocess.run(
            ["sbatch", "--test-only"],
            input=asked,
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_a_submitted_job_trains_the_recipe_as_it_was(cluster: Cluster, tmp_path: Path) -> None:
    """Queued behind another job; its recipe is edited meanwhile. Its environment holds what
    slurm.env names, and no more.
    """
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        asset("recipes", "digits-cnn.yaml").read_text().replace("name: digits-cnn", "name: mine")
    )
    overrides = [
        "slurm.gpus_per_node=0",
        "slurm.nodes=2",
        "train.steps=20",
        "track.wandb=off",
        "slurm.env=[WANTED]",
    ]
    bigtrain = [sys.executable, "-m", "bigtrain"]
    urgent = cluster.submit(
        "--partition=high", *NODES, "--exclusive", "--wrap", "sleep 8", cwd=tmp_path
    )
    run = cluster.environment | {"WANTED": "yes", "UNWANTED": "yes", "BIGTRAIN_SETUP": ""}
    bare = [*bigtrain, "submit", "mine.yaml", *overrides, "slurm.setup=look.sh", "slurm.time=10"]
    look = 'echo "WANTED=${WANTED:-no} UNWANTED=${UNWANTED:-no}"\n'
    (tmp_path / "look.sh").write_text(f"{look}export PATH={Path(sys.executable).parent}:$PATH\n")
    done = subprocess.run(
        [*bare, "--json"], cwd=tmp_path, env=run, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["job"]
    recipe.write_text("nonsense")

    def status() -> dict[str, object]:
        shown = subprocess.run(
            [*bigtrain, "status", "mine", "--json"],
            cwd=tmp_path,
            env=run,
            capture_output=True,
            text=True,
            check=False,
        )
        (found,) = json.loads(shown.stdout)
        return dict(found)

    assert status()["state"] == "queued"
    cluster.finish(urgent)
    assert cluster.finish(job) == "COMPLETED", (tmp_path / f"mine-{job}.out").read_text()
    said = (tmp_path / f"mine-{job}.out").read_text()
    assert "WANTED=yes UNWANTED=no" in said
    assert status()["state"] == "finished"
    assert status()["job"] == job
    effective = json.loads((tmp_path / "runs" / "mine" / "effective.json").read_text())
    assert "submitted-" in effective["optim.lr"]["origin"]
    assert effective["train.steps"]["origin"] == "override train.steps=20"


def test_a_sweep_trains_one_line_per_task(cluster: Cluster, tmp_path: Path) -> None:
    common = "track.wandb=off train.steps=3 train.eval_every=3"
    lines = [
        f"digits-cnn {common} name=a",
        f"digits-cnn {common} name=b 'track.project=$(touch x) \"y\"'",
    ]
    (tmp_path / "runs.txt").write_text("\n".join(lines) + "\n")
    sweep = str(asset("slurm", "sweep.sbatch"))
    job = cluster.submit(
        "--array=1-2",
        "--output=job-%a.log",
        sweep,
        "runs.txt",
        cwd=tmp_path,
        **environment(tmp_path),
    )
    for task in ("1", "2"):
        assert cluster.finish(f"{job}_{task}") == "COMPLETED", (
            tmp_path / f"job-{task}.log"
        ).read_text()
    assert '$(touch x) "y"' in (tmp_path / "runs" / "b" / "recipe.yaml").read_text()
    assert (tmp_path / "runs" / "a" / "summary.json").is_file()
    assert not (tmp_path / "x").exists()


def test_a_sweep_of_the_command_line_is_one_array(cluster: Cluster, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        asset("recipes", "digits-cnn.yaml").read_text().replace("name: digits-cnn", "name: mine")
    )
    asked = ["slurm.gpus_per_node=0", "slurm.array=0%1", "slurm.time=10"]
    fixed = [
        "train.steps=3",
        "train.eval_every=3",
        "track.wandb=off",
        "track.tags=[it's $(touch x)]",
    ]
    command = [
        sys.executable,
        "-m",
        "bigtrain",
        "sweep",
        "mine.yaml",
        "seed=0..1",
        *asked,
        *fixed,
        "--slurm",
    ]
    run = {name: value for name, value in cluster.environment.items() if name != "BIGTRAIN_SETUP"}
    done = subprocess.run(
        command, cwd=tmp_path, env=run, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recipe.write_text("nonsense")
    job = done.stdout.split()[1]
    (kept,) = (tmp_path / "runs" / "mine-sweep").glob("*.sbatch")
    assert "#SBATCH --array=1-2%1\n" in kept.read_text(), "one at a time, as the recipe has it"
    for task, seed in ((1, 0), (2, 1)):
        assert cluster.finish(f"{job}_{task}") == "COMPLETED", (
            tmp_path / f"mine-{job}_{task}.out"
        ).read_text()
        found = json.loads((tmp_path / "runs" / f"mine-seed{seed}" / "effective.json").read_text())
        assert (found["seed"]["value"], found["track.tags"]["value"]) == (seed, ["it's $(touch x)"])
    assert not (tmp_path / "x").exists()
    shown = subprocess.run(
        [*command[:3], "status", "--json"],
        cwd=tmp_path,
        env=run,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {(one["run"], one["state"]) for one in json.loads(shown.stdout)} == {
        (f"mine-seed{s}", "finished") for s in (0, 1)
    }


def test_the_doctor_starts_itself_on_every_task(cluster: Cluster, tmp_path: Path) -> None:
    command = f"{sys.executable} -m bigtrain doctor --slurm --json"
    job = cluster.submit(
        *NODES, "--output=job.log", "--wrap", command, cwd=tmp_path, SLURM_MPI_TYPE="none"
    )
    end = cluster.finish(job)
    rows = json.loads(log(tmp_path)[log(tmp_path).index("[{") :].splitlines()[0])
    assert not wrong_but_for_speed(rows)
    assert end == ("COMPLETED" if all(row["ok"] for row in rows) else "FAILED"), log(tmp_path)
    assert "all-reduce" in {row["check"] for row in rows}, "there were two"


def wrong_but_for_speed(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """What the doctor found wrong. Two ranks may not be equally fast on two cores that are busy."""
    return [row for row in rows if not row["ok"] and row["check"] != "matrix multiply"]


def doctor(
    cluster: Cluster, folder: Path, before: str = "", **more: str
) -> tuple[int, list[dict[str, object]]]:
    """`srun bigtrain doctor` on the two nodes, each rank after a piece of shell."""
    wrapper = folder / "wrapper.sh"
    wrapper.write_text(f'{before}\nexec "$@"\n')
    command = [
        "srun",
        *NODES,
        "--mpi=none",
        "bash",
        str(wrapper),
        sys.executable,
        "-m",
        "bigtrain",
        "doctor",
        "--json",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env=cluster.environment | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "[{" in done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout[done.stdout.index("[{") :].splitlines()[0])


def test_the_doctor_finds_a_healthy_allocation_healthy(cluster: Cluster, tmp_path: Path) -> None:
    code, rows = doctor(cluster, tmp_path)
    assert not wrong_but_for_speed(rows)
    assert code == (0 if all(row["ok"] for row in rows) else 1)
    assert {"all-reduce", "clocks", "deepspeed", "run directory"} <= {
        str(row["check"]) for row in rows
    }
    assert not (tmp_path / "runs").exists(), "it leaves nothing"


def test_the_doctor_finds_what_is_wrong_and_on_which_rank(cluster: Cluster, tmp_path: Path) -> None:
    fake = tmp_path / "other" / "deepspeed-0.18.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.0\n")
    (tmp_path / "runs").mkdir()
    on_rank_one = f"""
if [ "$SLURM_PROCID" = 1 ] && [ -z "${{INSIDE:-}}" ]; then
    export INSIDE=1 PYTHONPATH={tmp_path}/other
    exec unshare --mount bash -c '
        mount -t tmpfs -o size=1m tmpfs /dev/shm && mount --bind runs runs &&
        mount -o remount,bind,ro runs && exec "$@"' - "$@"
fi"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, rows = doctor(cluster, tmp_path, on_rank_one, MASTER_PORT=str(taken.getsockname()[1]))
    red = {str(row["check"]): row for row in rows if not row["ok"]}
    assert code == 1
    assert set(red) == {"deepspeed", "/dev/shm free", "run directory", "port"}, red
    assert "rank 1: 0.18.0" in str(red["deepspeed"]["found"])
    assert "rank 1" in str(red["/dev/shm free"]["found"])
    assert "rank 1: runs: Read-only file system" in str(red["run directory"]["found"])
    assert all(row["advice"] for row in red.values())
