"""Commands of ours side by side, each on devices of its own; what ``bench.isoflop`` and ``bench.tuning`` train with."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bench.common.children import Children
from bench.common.turns import last_words
from trainer.exit_status import EXIT_PREEMPTED
from trainer.local_ranks import deepspeed_launcher, environment_alone, free_port


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: what to call it when it fails.
        arguments: a module of ours and its arguments.
        log: file for all that it prints.
        ranks: processes, under ``deepspeed`` if more than one.
        finish: called when it has ended well.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    ranks: int = 1
    finish: Callable[[], None] = lambda: None


def side_by_side(jobs: Sequence[Job], at_once: int, threads: int, unit: str) -> list[str]:
    """Run ``jobs``, ``at_once`` of them at any time; a sentence for each that failed, in their order.

    Args:
        jobs: to run.
        at_once: how many.
        threads: of each process.
        unit: what the progress bar counts.

    Raises:
        KeyboardInterrupt, SystemExit: on a signal that asks to stop, once the jobs that run have saved and ended.
    """
    if not jobs:
        return []
    places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for devices in device_sets(at_once, jobs[0].ranks):
        places.put(devices)
    problems: dict[Job, str] = {}
    with Children() as children, ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), unit=unit) as bar:
        waiting = {pool.submit(_run, job, places, threads, children): job for job in jobs}
        for done in as_completed(waiting):
            if problem := done.result():
                problems[waiting[done]] = problem
            bar.update()
    return [problems[job] for job in jobs if job in problems]


def device_sets(at_once: int, ranks: int) -> list[str | None]:
    """The GPUs of each of ``at_once`` jobs of ``ranks`` ranks, ``2,3``; shared where there are too few. None without.

    Raises:
        ValueError: if one job needs more than there are.
    """
    import torch

    from trainer.deepspeed_internals import uses_cuda

    count = torch.cuda.device_count() if uses_cuda() else 0
    if not count:
        return [None] * at_once
    if ranks > count:
        raise ValueError(f"--ranks {ranks} needs as many GPUs, but there are {count}; take fewer ranks")
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return [",".join(names[(place * ranks + rank) % count] for rank in range(ranks)) for place in range(at_once)]


def _run(job: Job, places: queue.SimpleQueue[str | None], threads: int, children: Children) -> str | None:
    """Run a job on a free set of devices; a sentence if it did not do what it was to."""
    devices = places.get()
    environment = environment_alone(threads)
    command = [sys.executable, "-m", *job.arguments]
    if devices is None:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    elif job.ranks == 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    if job.ranks > 1:
        command = [*deepspeed_launcher(job.ranks, free_port(), devices), "--module", *job.arguments]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        status = children.run(command, job.log, environment)
    finally:
        places.put(devices)
    if status and children.signals:
        return None  # what runs was asked to stop; nothing failed
    if status == EXIT_PREEMPTED:
        return f"{job.name}: it was asked to stop and has saved; the same command goes on with it"
    if status:
        return f"{job.name}: {last_words(job.log, status)} (all that it printed: {job.log})"
    job.finish()
    return None
