"""A real Slurm of two nodes on this machine: slurmctld and two slurmd, no accounting, no munge, on
loopback only.

Needs root and the packages that `make slurm` installs (slurmctld, slurmd, slurm-client).
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={d1} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={d2} CPUs=2 RealMemory=8000
# With GPUs that nobody looks for: what sbatch --test-only is asked about.
{gpu_nodes}
PartitionName=gpu Nodes=g[1-4] MaxTime=INFINITE
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """The daemons, and the commands of a user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = [_free_port() for _ in range(7)]
        (folder / "state").mkdir()
        nodes = ["n1", "n2", "g1", "g2", "g3", "g4"]
        for node in nodes:
            (folder / f"spool-{node}").mkdir()
        host = socket.gethostname().split(".")[0]
        more = (
            "NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=8000 Gres=gpu:8"
        )
        gpu_nodes = [
            f"NodeName={n} {more.format(host=host, port=p)}"
            for n, p in zip(nodes[2:], ports[3:], strict=True)
        ]
        text = CONFIGURATION.format(
            host=host,
            folder=folder,
            ctld=ports[0],
            d1=ports[1],
            d2=ports[2],
            gpu_nodes="\n".join(gpu_nodes),
        )
        (folder / "slurm.conf").write_text(text)
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"NodeName=g[1-4] Name=gpu File={folder}/gpu[0-7]\n")
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in nodes)]
        self.daemons = [
            subprocess.Popen(
                [_program(c[0]), *c[1:]],
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for c in commands
        ]
        try:
            self.wait(self.idle, 30, "two idle nodes")
        except AssertionError:
            self.close()
            raise

    def idle(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split() == ["idle", "idle"]

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """A command of Slurm's; its output."""
        done = subprocess.run(
            [_program(command[0]), *command[1:]],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() or done.stderr.strip()

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """sbatch; the job's number."""
        command = [_program("sbatch"), "--parsable", *arguments]
        done = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip().split(";")[0]

    def state(self, job: str) -> str:
        """The job's state, e.g. RUNNING; its exit code follows after a colon."""
        fields = dict(
            part.split("=", 1)
            for part in self.run("scontrol", "show", "job", job).split()
            if "=" in part
        )
        return fields.get("JobState", "GONE")

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        fields = dict(
            part.split("=", 1)
            for part in self.run("scontrol", "show", "job", job).split()
            if "=" in part
        )
        return fields.get(name, "")

    def release(self, job: str) -> None:
        """Start a requeued job now, which Slurm would hold back for two minutes."""
        self.run("scontrol", "update", f"jobid={job}", "starttime=now")

    def finish(self, job: str, seconds: float = 150) -> str:
        """Wait for the end of the job, without the two minutes that a requeued one is held."""

        waiting = 0

        def ended() -> bool:
            nonlocal waiting
            waiting = waiting + 1 if self.state(job) == "PENDING" else 0
            if (
                waiting > 8
            ):  # four seconds: its last life must be over everywhere, or the node refuses the next
                self.release(job)
            return self.state(job) in (
                "COMPLETED",
                "FAILED",
                "CANCELLED",
                "TIMEOUT",
                "NODE_FAIL",
                "GONE",
            )

        self.wait(ended, seconds, f"the end of job {job}")
        return self.state(job)

    def wait(self, true: object, seconds: float, what: str) -> None:
        """Look twice a second; AssertionError with the daemon's last words."""
        deadline = time.monotonic() + seconds
        while not true():  # type: ignore[operator]
            if time.monotonic() > deadline:
                log = (self.folder / "slurmctld.log").read_text()[-3000:]
                raise AssertionError(
                    f"waited {seconds:.0f} s for {what}\n{self.run('squeue', '-l')}\n{log}"
                )
            time.sleep(0.5)

    def close(self) -> None:
        self.run("scancel", "--user=root", "--signal=KILL", "--full")
        self.run("scancel", "--user=root")
        time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def missing() -> str:
    """What stands in the way of a cluster here; empty: nothing."""
    if lacking := [name for name in PROGRAMS if _program(name) == name and not shutil.which(name)]:
        return f"{', '.join(lacking)} not installed (as root: make slurm installs them)"
    return "" if os.geteuid() == 0 else "a cluster of one's own needs root"


def _program(name: str) -> str:
    """Debian keeps the daemons where a user's PATH may not look."""
    return next(
        (f"{folder}/{name}" for folder in ("/usr/sbin", "/usr/bin") if Path(folder, name).exists()),
        name,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
