"""Start the project's commands: forked ones (``tests/ranks.py``), or as a user does, by real launchers.

Forked is the way unless the launcher, the interpreter's start or the noise of the imports is what a test is about: a
launcher and two ranks import everything three times, which takes 20 seconds of a core.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def command(module: str, *arguments: str, processes: int = 1, launcher: str = "python") -> list[str]:
    """The command line that starts ``module`` under ``launcher``: python (one process), deepspeed or torchrun."""
    if launcher == "python":
        assert processes == 1
        return [sys.executable, "-m", module, *arguments]
    port = str(free_port())
    if launcher == "torchrun":
        start = [str(BIN / "torchrun"), f"--nproc-per-node={processes}", "--master-port", port, "-m"]
    else:
        start = [str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", port]
        start += ["--log_level", "warning", "--module"]
    return [*start, module, *arguments]


def environment(device: str = "cpu") -> dict[str, str]:
    """This process's environment with the threads pinned, so that two ranks do not fight and sums are repeatable."""
    threads = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ranks)} | threads


def run(
    module: str,
    *arguments: str,
    processes: int = 1,
    launcher: str = "fork",
    device: str = "cpu",
    timeout_s: float = 240,
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; stdout and stderr together in ``stdout``.

    Args:
        module: run as ``python -m`` does.
        arguments: the command's.
        processes: ranks; one is a plain process.
        launcher: fork, or one of :func:`command`.
        device: of DeepSpeed; what is forked is on the CPU, so on another one fork is python.
        timeout_s: after which all are killed, and ``subprocess.TimeoutExpired`` is raised.
        variables: further environment.
    """
    if launcher == "fork" and device == "cpu":
        from tests.ranks import Processes

        with Processes(module, *arguments, count=processes, variables=variables) as forked:
            status = forked.status(timeout_s)
        return subprocess.CompletedProcess([module, *arguments], status, forked.output)
    return subprocess.run(
        command(module, *arguments, processes=processes, launcher=launcher.replace("fork", "python")),
        check=False,
        cwd=ROOT,
        env=environment(device) | (variables or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
    )


def run_command(command: list[str], env: dict[str, str], stdout: Any, **_: Any) -> subprocess.CompletedProcess[str]:
    """In place of ``subprocess.run`` of ``[python, "-m", module, ...]``: the same, forked.

    Args:
        command, env: as of ``subprocess.run``.
        stdout: a binary file for the output, or ``subprocess.PIPE``.
    """
    python, option, module, *arguments = command
    assert (python, option) == (sys.executable, "-m")
    done = run(module, *arguments, variables=env)
    if hasattr(stdout, "write"):
        stdout.write(done.stdout.encode())
    return done


def start(module: str, *arguments: str, processes: int = 1, launcher: str = "python") -> subprocess.Popen[str]:
    """Start in a process group of its own, so that a test can kill all of it."""
    return subprocess.Popen(
        command(module, *arguments, processes=processes, launcher=launcher),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def has_ended(process: psutil.Process) -> bool:
    """Gone, or a zombie: whoever takes in a launcher's orphans may look at them late, or never."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE or not process.is_running()
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
