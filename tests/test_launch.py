"""launch/: the scripts start real ranks, and Accelerate reads the configurations."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from bigtrain.engine.launcher import read_launcher
from bigtrain.runs.directory import asset

SHORT = ["digits-cnn", "train.steps=3", "train.eval_every=3", "track.wandb=off"]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def launch(
    name: str, *arguments: str, cwd: Path, **environment: str
) -> dict[str, dict[str, object]]:
    """Run a script of launch/; the settings that were then in force."""
    done = subprocess.run(
        [str(asset("launch", name)), *arguments],
        cwd=cwd,
        env=os.environ | {"PATH": PATH} | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((cwd / "runs" / "digits-cnn" / "effective.json").read_text()))


def test_many_nodes_are_started_from_one(tmp_path: Path) -> None:
    """Two "machines" on this one; what stands in for ssh hands the line to a shell, as ssh does."""
    ssh = tmp_path / "ssh.sh"
    ssh.write_text('shift\nexec env --ignore-environment bash -c "$*"\n')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    project = "track.project=it's $(touch x)"
    hosts = {
        "HOSTS": "127.0.0.1 127.0.0.1",
        "SSH": f"bash {ssh}",
        "RANKS": "1",
        "MASTER_PORT": str(port),
    }
    found = launch("many_nodes.sh", *SHORT, project, cwd=tmp_path, **hosts)
    assert found["engine.world_size"]["value"] == 2
    assert found["track.project"]["value"] == "it's $(touch x)"
    assert not (tmp_path / "x").exists()


def test_cpu_ranks_on_one_machine(tmp_path: Path) -> None:
    assert launch("cpu.sh", *SHORT, cwd=tmp_path, RANKS="2")["engine.world_size"]["value"] == 2


@pytest.mark.parametrize(
    "name", ["one_gpu", "multi_gpu", "multi_node", "zero2", "zero3", "zero3_offload"]
)
def test_accelerate_reads_the_configuration(name: str) -> None:
    config = load_config_from_file(
        str(asset("launch", f"{name}.yaml"))
    )  # raises for a key it does not know
    said = config.deepspeed_config or {}
    environ = {
        "ACCELERATE_USE_DEEPSPEED": str(bool(said)).lower(),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
    }
    for key in ("zero_stage", "offload_optimizer_device", "offload_param_device"):
        environ[f"ACCELERATE_DEEPSPEED_{key.upper()}"] = str(said.get(key, "none"))
    launcher = read_launcher(environ)
    assert launcher.kind == (name.removesuffix("_offload") if said else None)
    assert launcher.offload == ("params" if "offload" in name else "none" if said else None)


def test_accelerate_launches_two_ranks_with_one(tmp_path: Path) -> None:
    command = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(asset("launch", "zero2.yaml")),
        "--num_processes",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, *command, "-m", "bigtrain", "train", *SHORT],
        cwd=tmp_path,
        env=os.environ | {"PATH": PATH},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "runs" / "digits-cnn" / "effective.json").read_text())
    assert (found["engine.world_size"]["value"], found["engine.kind"]) == (
        2,
        {"value": "zero2", "origin": "launcher"},
    )
