"""Detects whether the launcher that started this rank is gone.

A launcher that is killed cannot end its ranks: they would keep their GPUs with nothing left to stop them. SIGTERM to
the ``deepspeed`` command ends only that command (DeepSpeed 0.19 does not forward it), SIGKILL to any launcher ends only
it. Linux gives an orphan another parent, which is checked for every link from the rank up to the process that a user
would kill:

    rank <- deepspeed.launcher.launch <- deepspeed                 one host
    rank <- deepspeed.launcher.launch [<- shell] <- sshd           a host of a hostfile, reached by pdsh
    rank <- torchrun

Processes above it are not checked, nor are other parents: ``nohup``, ``setsid``, tmux, a container's first process or
a closed shell may all leave a run behind on purpose.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

_MOST_SHELLS = 3


def launcher_above() -> list[int]:
    """Process ids of the launcher above this process, nearest first; empty if no launcher of ours started it."""
    parent = os.getppid()
    words = _words(parent)
    if words & {"torchrun", "torch.distributed.run"}:
        return [parent]
    if "deepspeed.launcher.launch" not in words:
        return []
    chain = [parent]
    for _ in range(_MOST_SHELLS):
        above = _parent(chain[-1])
        if above is None:
            break
        chain.append(above)
        if _words(above) & {"deepspeed", "ds", "deepspeed.launcher.runner"} or _name(above).startswith("sshd"):
            return chain
    return [parent]


def is_gone(chain: list[int]) -> bool:
    """True if a process of ``chain`` (see :func:`launcher_above`) is no longer the parent of the one below it."""
    parents = [os.getppid(), *map(_parent, chain[:-1])]
    return parents[: len(chain)] != chain


def started_as(chain: list[int]) -> list[str] | None:
    """The command that this run was started with, as typed by a user; None where only a scheduler knows it.

    Args:
        chain: see :func:`launcher_above`.
    """
    if not chain:
        # sys.orig_argv has the interpreter as it was typed. What srun or another host's shell was given is not seen.
        return None if "SLURM_STEP_NUM_TASKS" in os.environ or "RANK" in os.environ else list(sys.orig_argv)
    line = _line(chain[-1])
    for place, word in enumerate(line[:3]):
        if Path(word).name in ("deepspeed", "ds", "torchrun"):
            name = Path(word).name
            return [name if shutil.which(name) == word else word, *line[place + 1 :]]
        if word in ("torch.distributed.run", "deepspeed.launcher.runner"):
            return ["python", *line[place - 1 :]]
    return None


def command_again(override: str) -> str:
    """The command that starts this run again with ``override`` (``key=value``), ready to be pasted into a shell."""
    if STARTED_AS is None:
        return f"the same command with {override}"
    key = f"{override.partition('=')[0]}="
    return shlex.join([*(word for word in STARTED_AS if not word.startswith(key)), override])


def _parent(pid: int) -> int | None:
    """Parent of ``pid``; None if there is no such process, or no /proc to see it in."""
    try:
        # The name, second and in parentheses, may hold anything, so what follows is counted from its end.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _words(pid: int) -> set[str]:
    """What a process was started as: its interpreter, script or module, without folders and without arguments."""
    return {Path(word).name for word in _line(pid)[:4]}


def _line(pid: int) -> list[str]:
    """The words of a process's command line; none if there is no such process."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return line.removesuffix("\0").split("\0")


LAUNCHER = launcher_above()
"""Read at import, before a rank does anything slow: an orphan can no longer find out who its parent was."""
STARTED_AS = started_as(LAUNCHER)
"""Read at import too: after Ctrl-C the ``deepspeed`` command ends at once, and the ranks when they have saved."""
