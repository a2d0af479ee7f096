"""Where the run will write: the run folder, room for its checkpoints, and how fast they can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data.urls import require_reachable
from launch.doctor.findings import Finding
from settings import counted
from trainer.checkpoints import resume
from trainer.checkpoints.bucket import Bucket, unreachable
from trainer.checkpoints.compatibility import refuse_taken
from trainer.checkpoints.fetch import mirrored_names
from trainer.checkpoints.layout import checkpoints_of, newest_first, newest_name
from trainer.checkpoints.ownership import of_another_run
from trainer.config_blocks import TrainConfig
from trainer.distributed import ALONE
from trainer.monitor.trackers.check import refuse_unusable

PROBE_BYTES = 64 * 2**20
_SAVE_LONG_S = 600.0


def run_folder(train: TrainConfig) -> Iterator[Finding]:
    """Whether the run would start there.

    Raises:
        ValueError: if it would refuse to, with its own message.
    """
    folder = checkpoints_of(str(train.run_dir))
    if train.checkpoint.resume == "never":
        resume.find_checkpoint(folder, "never", ALONE)
        yield Finding("run folder", "ok", f"{train.run_dir} holds no checkpoints; the run starts afresh")
        return
    there = newest_name(folder)
    if train.checkpoint.mirror is not None and not newest_first(folder):
        yield Finding("run folder", "ok", f"{train.run_dir}: {there}; the mirror is checked")
        return
    if train.checkpoint.resume == "required" and not newest_first(folder):
        remedy = "check train.run_dir, or set train.checkpoint.resume=auto"
        yield Finding("run folder", "error", f"{train.run_dir} has nothing to resume from: {there}", remedy)
    else:
        yield Finding("run folder", "ok", f"{train.run_dir}: {there}")


def trackers(train: TrainConfig) -> Iterator[Finding]:
    """Whether the run's trackers are installed, and have a server and credentials; no server is contacted.

    Raises:
        ValueError: if one is not, with the run's own message.
    """
    refuse_unusable(train.log.trackers)
    yield Finding("trackers", "ok", ", ".join(train.log.trackers) or "none")


def mirror(train: TrainConfig) -> Iterator[Finding]:
    """Whether the bucket can be written, with one small file that is removed again, and its newest checkpoint.

    Raises:
        ValueError: if the run would refuse to start because of it, with its own message.
    """
    url, folder = str(train.checkpoint.mirror), checkpoints_of(str(train.run_dir))
    require_reachable(url, "train.checkpoint.mirror")
    names = mirrored_names(url, ALONE)
    if not newest_first(folder):
        refuse_taken(url, names, train.checkpoint.resume, "train.checkpoint.mirror")
    elif problem := of_another_run(Bucket(url), folder.parent):
        raise ValueError(problem)
    started = time.perf_counter()
    try:
        Bucket(url).try_writing()
    except Exception as error:  # each service has classes of its own
        raise ValueError(unreachable(url, error)) from error
    took_ms = (time.perf_counter() - started) * 1e3
    there = f"the newest checkpoint there is {names[0]}" if names else "no checkpoint there"
    yield Finding("mirror", "ok", f"{url}: {there}; a small file written and removed in {took_ms:,.0f} ms")


def space(folder: Path, size_bytes: float | None, keep: int) -> Iterator[Finding]:
    """Free bytes against ``keep`` checkpoints of ``size_bytes`` and the one being written."""
    free = shutil.disk_usage(folder).free
    here = f"{free / 1e9:,.1f} GB free at {folder}"
    if size_bytes is None:
        yield Finding("disk", "ok", here)
        return
    needed = (keep + 1) * size_bytes
    kept = f"{counted(keep, 'checkpoint')} of {size_bytes / 1e9:,.3g} GB"
    what = f"{here}; {kept} and one being written take {needed / 1e9:,.3g} GB"
    if free < needed:
        remedy = "make room, set train.run_dir elsewhere, or keep fewer (train.checkpoint.keep, keep_every_steps)"
        yield Finding("disk", "error" if free < size_bytes else "warning", what, remedy)
    else:
        yield Finding("disk", "ok", what)


def write_speed(folder: Path, size_bytes: float | None, probe_bytes: int | None = None) -> Iterator[Finding]:
    """Write and sync a file of ``probe_bytes`` (64 MiB unless given), and remove it.

    Raises:
        OSError: if that is not possible.
    """
    probe_bytes = probe_bytes or PROBE_BYTES
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        started = time.perf_counter()
        for _ in range(probe_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        rate = probe_bytes / (time.perf_counter() - started)
    yield judge_speed(rate, size_bytes)


def judge_speed(rate: float, size_bytes: float | None) -> Finding:
    """The finding on ``rate`` bytes a second."""
    here = f"{rate / 1e9:.2f} GB/s from one process, synced"
    if size_bytes is None:
        return Finding("write speed", "ok", here)
    what = f"{here}; a checkpoint in about {size_bytes / rate:,.0f} s if the ranks share that"
    if size_bytes / rate > _SAVE_LONG_S:
        return Finding("write speed", "warning", what, "save to a faster disk, or less often (checkpoint.every_steps)")
    return Finding("write speed", "ok", what)
