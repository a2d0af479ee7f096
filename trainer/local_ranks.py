"""Start ranks on this machine: the launcher command before ``--module``, the environment, a rendezvous port."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def deepspeed_launcher(ranks: int, port: int, devices: str | None = None) -> list[str]:
    """The ``deepspeed`` command of this Python.

    Args:
        ranks: number of ranks, one per GPU if there are GPUs.
        port: of the rendezvous.
        devices: the GPUs to use, such as ``2,3``; the first ones unless given, as the command ignores
            CUDA_VISIBLE_DEVICES.

    Raises:
        ValueError: if GPUs are not named by number, the only form that the command accepts.
    """
    if devices is not None and not all(name.strip().isdigit() for name in devices.split(",")):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES names GPUs as {devices}, but the deepspeed launcher takes only numbers; give those "
            "of nvidia-smi"
        )
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error"]
    launcher += ["--num_gpus", str(ranks)] if devices is None else ["--include", f"localhost:{devices}"]
    return [*launcher, "--master_port", str(port)]


def visible_gpus(ranks: int) -> str | None:
    """The first ``ranks`` GPUs that CUDA_VISIBLE_DEVICES names, for :func:`deepspeed_launcher`; None if unset."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(names.split(",")[:ranks]) if names else None


def environment_alone(threads: int) -> dict[str, str]:
    """This process's environment for a separate run with ``threads`` threads, without rank and rendezvous variables.

    DeepSpeed leaves those in the environment of a process that it has run in, so two runs would meet at one port.
    """
    ours = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    return ours | {"OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
