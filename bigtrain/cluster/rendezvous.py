"""Which rank this process is, of how many, and where they meet."""

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Rendezvous:
    """Which rank this is, of how many, and where they meet."""

    rank: int
    world_size: int
    address: str
    port: int


def find_rendezvous() -> Rendezvous:
    """From torchrun's variables, else from Slurm's; else this process is alone."""
    env = os.environ
    port = int(env.get("MASTER_PORT", 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    if "RANK" in env and "WORLD_SIZE" in env:
        address = env.get("MASTER_ADDR", "127.0.0.1")
        return Rendezvous(int(env["RANK"]), int(env["WORLD_SIZE"]), address, port)
    # A batch script itself is not a step; a shell that salloc gave is one, of a single task.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_NODELIST" not in env or tasks == 1:
        return Rendezvous(0, 1, "127.0.0.1", port)
    address = env.get("MASTER_ADDR") or _first_address(env["SLURM_STEP_NODELIST"])
    return Rendezvous(int(env["SLURM_PROCID"]), tasks, address, port)


def become_rank_of_slurm_step() -> None:
    """Set what torchrun would set, if srun has started this process as one of many."""
    meeting = find_rendezvous()
    if "RANK" in os.environ or meeting.world_size == 1:
        return
    os.environ["RANK"] = f"{meeting.rank}"
    os.environ["WORLD_SIZE"] = f"{meeting.world_size}"
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ["MASTER_ADDR"] = meeting.address
    os.environ["MASTER_PORT"] = f"{meeting.port}"


def _first_address(nodes: str) -> str:
    """The address of the first of Slurm's nodes, whose name need not be a host's.

    Where there is no scontrol: the address of the machine that srun was called on.
    """
    if not shutil.which("scontrol"):
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    names = _scontrol("hostnames", nodes).split()
    name = names[0] if names else nodes
    for word in _scontrol("node", name).split():
        key, _, value = word.partition("=")
        if key == "NodeAddr":
            return value
    return name


def _scontrol(*arguments: str) -> str:
    """What `scontrol show` prints of something; nothing if it fails."""
    command = ["scontrol", "show", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
