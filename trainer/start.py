"""Start ranks on this machine: the words before ``--module``, and a port for them to meet at."""

from __future__ import annotations

import socket
import sys
from pathlib import Path


def deepspeed_launcher(ranks: int, port: int, devices: str | None = None) -> list[str]:
    """The ``deepspeed`` command of this Python.

    Args:
        ranks: how many, one a GPU where there are any.
        port: where they meet.
        devices: the GPUs to take, ``2,3``; the first ones unless given.
    """
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error"]
    launcher += ["--num_gpus", str(ranks)] if devices is None else ["--include", f"localhost:{devices}"]
    return [*launcher, "--master_port", str(port)]


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
