"""NCCL's flight recorder: the last collectives of every rank, written into the run folder when a run hangs.

    RUN/flight/rank-N        written by the watchdog at a stall, or by NCCL itself when a collective times out
    torchfrtrace --prefix rank- RUN/flight       compares them: which rank did not reach which collective

Recording takes a ring buffer in host memory, and no measurable step time. gloo has no recorder.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import MutableMapping
from pathlib import Path

import torch.distributed as dist

FOLDER = "flight"
_ENTRIES = "2000"
"""Collectives kept in the ring buffer; one step at ZeRO 3 has some hundreds."""
_PATIENCE_S = 3.0


def enable(run: Path | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have NCCL record, unless the user's variables say otherwise; call before the process group is created.

    The names are those of torch 2.13, which falls back to the older ``TORCH_NCCL_TRACE_BUFFER_SIZE`` and
    ``TORCH_NCCL_DEBUG_INFO_TEMP_FILE``.
    """
    wanted = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in environment:
        wanted["TORCH_FR_BUFFER_SIZE"] = _ENTRIES
    if run is not None:
        if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environment:
            wanted["TORCH_FR_DUMP_TEMP_FILE"] = str(run.absolute() / FOLDER / "rank-")
        with contextlib.suppress(OSError):  # an unwritable folder is reported when the run is opened
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, value in wanted.items():
        environment.setdefault(name, value)


def dump(run: Path, rank: int) -> Path | None:
    """Write this rank's recorded collectives, return the path; None without a recorder or a prompt answer."""
    if not (dist.is_initialized() and dist.get_backend() == "nccl"):
        return None
    path = run / FOLDER / f"rank-{rank}"
    written = threading.Event()

    def write() -> None:
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            content = _recorded()
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            written.set()

    thread = threading.Thread(target=write, name="flight-recorder", daemon=True)  # a hung driver may hang it too
    thread.start()
    thread.join(_PATIENCE_S)
    return path if written.is_set() else None


def _recorded() -> bytes:
    """All entries with their stacks, pickled: torch's own, which only a build with NCCL has."""
    from torch._C import _distributed_c10d

    return bytes(_distributed_c10d._dump_nccl_trace(True, True, False))  # type: ignore[attr-defined]
