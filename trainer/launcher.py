"""Is the launcher that started this rank still there?

A launcher that is killed cannot end its ranks: they would keep their GPUs with nobody left to stop them. SIGTERM to the
``deepspeed`` command ends only that command (DeepSpeed 0.19 does not pass it on), SIGKILL to any launcher ends only it.
Linux gives an orphan another parent, and that is what is looked for, in every link from the rank up to the process that
a person can kill:

    rank <- deepspeed.launcher.launch <- deepspeed                 one host
    rank <- deepspeed.launcher.launch [<- shell] <- sshd           a host of a hostfile, reached by pdsh
    rank <- torchrun

What is above is not looked at, and other parents are not either: ``nohup``, ``setsid``, tmux, a container's first
process or a shell that is closed may all leave a run behind on purpose.
"""

from __future__ import annotations

import os
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
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return set()
    return {Path(word).name for word in line.split("\0")[:4]}


LAUNCHER = launcher_above()
"""Read at import, before a rank does anything slow: an orphan can no longer tell who its parent was."""
