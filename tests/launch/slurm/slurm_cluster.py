"""A real SLURM cluster of three nodes on this machine: munged, slurmctld and three slurmd in a temporary folder.

The nodes are called 127.0.0.1 to 127.0.0.3, so that the first host of a job's node list is one that ranks can meet at.
Needs no root.
"""

from __future__ import annotations

import getpass
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, environment, free_port
from tests.programs import SEARCH, where

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdTimeout=5
ReturnToService=2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """Three nodes of one CPU each.

    Attributes:
        environment: for commands that talk to it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = environment() | {"SLURM_CONF": str(self.conf), "PATH": SEARCH}
        self._slurmd: dict[str, subprocess.Popen[bytes]] = {}
        text = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            port=free_port(),
            user=getpass.getuser(),
            folder=folder,
            # Ranks meet at a port that follows from the job's id: jobs of two such clusters must not meet each other.
            first_job=random.SystemRandom().randint(1, 39_000),
        )
        for node in NODES:
            text += f"NodeName={node} NodeHostname=localhost Port={free_port()} CPUs=1\n"
        self.conf.write_text(text)

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(64))
        files = {"socket": "munge.socket", "key-file": "munge.key", "seed-file": "munge.seed", "pid-file": "munge.pid"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--log-file={self.folder / 'munged.log'}", *options)
        self.wait((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait(self.is_idle, "idle nodes")

    def start_node(self, node: str) -> None:
        """Start, or start again, the daemon of a node."""
        self._slurmd[node] = self._daemon("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the daemon of a node and to all that runs there, as when its power fails."""
        here = [process for process, its in self._processes() if its.get("SLURMD_NODENAME") == node]
        keepers = [p for process in here for p in process.parents() if p.name().startswith("slurmstepd")]
        for process in [psutil.Process(self._slurmd[node].pid), *dict.fromkeys(keepers), *here]:
            process.kill()
        self._slurmd[node].wait()

    def run(self, *command: str) -> str:
        """Stdout of a command that succeeds."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, timeout_s: float = 300) -> dict[str, str]:
        """Wait until a job is in one of ``states``; returns what is known of it."""
        self.wait(lambda: self.job(job)["JobState"] in states, f"job {job} {states}", timeout_s)
        return self.job(job)

    def start_now(self, job: str) -> None:
        """A job that was requeued waits for two minutes; not here, but for as long as its nodes clean up after it."""
        self.wait(self.is_idle, "idle nodes")
        time.sleep(3)  # in the same second SLURM refuses the job's credential, which it has just revoked
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def is_idle(self) -> bool:
        """All nodes are up and have nothing to do."""
        return self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(NODES))]

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
        """Poll until ``condition``."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{what} did not come within {timeout_s} s"
            time.sleep(0.2)

    def stop(self) -> None:
        """Kill all that carries this cluster's name."""
        for process, _ in self._processes():
            process.kill()

    def _daemon(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = where(program)
        assert path is not None
        log = (self.folder / f"{program}.out").open("ab")
        return subprocess.Popen([path, *arguments], env=self.environment, stdout=log, stderr=log)

    def _processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Every process of this cluster, with its environment."""
        for process in psutil.process_iter():
            try:
                its = process.environ()
            except psutil.Error:  # it ended, or is somebody else's
                continue
            if its.get("SLURM_CONF") == str(self.conf):
                yield process, its


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster, for tests marked ``needs(*SLURM)``."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path may have 107 characters
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
