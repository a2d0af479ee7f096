"""Work through parts with all cores: one process per part, which reads and tokenizes.

With fewer parts than cores, a part's process only reads, and its own worker processes tokenize.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data.prepare.encode import end_with_parent
from data.prepare.parts import Part, Report
from data.prepare.progress import Progress
from settings import counted
from settings.user_errors import is_users

Job = Callable[[Part, int, Report], object]
"""What to do with a part, with how many processes, reporting progress. Can be pickled."""
_LOOK_EVERY_S = 0.5


def work_through(parts: Sequence[Part], job: Job, workers: int, unit: str, divisible: bool) -> None:
    """Do ``job`` for all ``parts``, the largest first, with ``workers`` processes; with 1, in this process.

    Args:
        parts: in any order.
        job: see :data:`Job`.
        workers: processes at work at once, including those that jobs start.
        unit: of the progress that jobs report, such as ``tokens``.
        divisible: a job makes use of more than one process.

    Raises:
        ValueError: a job's; the others stop, and keep what they finished. Or a process was killed.
    """
    waiting = sorted(parts, key=lambda part: -part.bytes)
    if workers > 1 and len(waiting) > 1:
        _share_out(waiting, job, workers, unit, divisible)
        return
    for part in waiting:
        with Progress(part.source.config.name, unit) as progress:
            job(part, workers, progress.add)


def _share_out(waiting: list[Part], job: Job, workers: int, unit: str, divisible: bool) -> None:
    # Not forked: a fork would copy locks held by threads of the libraries that read the sources.
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    count, free, before = len(waiting), workers, 0
    running: dict[Future[str | None], int] = {}
    pool = ProcessPoolExecutor(min(workers, count), mp_context=context, initializer=_begin, initargs=(done, stop))
    try:
        with Progress(counted(count, "part"), unit) as progress:
            while waiting or running:
                while waiting and free:
                    processes = processes_for(waiting, free) if divisible else 1
                    running[pool.submit(_do, job, waiting.pop(0), processes)] = processes
                    free -= processes
                for future in wait(running, _LOOK_EVERY_S, FIRST_COMPLETED).done:
                    free += running.pop(future)
                    if (mistake := future.result()) is not None:
                        raise ValueError(mistake)
                now = done.value
                progress.add(now - before, f"{count - len(waiting) - len(running)} of {count} parts done")
                before = now
    except BrokenProcessPool:
        raise ValueError(
            f"a process that prepares a part was killed, probably for memory; start again with fewer than {workers} "
            "--workers, finished shards are kept"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def processes_for(waiting: Sequence[Part], free: int) -> int:
    """How many of the ``free`` processes the next part gets: its share of the remaining bytes."""
    total = sum(part.bytes for part in waiting)
    return min(free, max(1, round(free * waiting[0].bytes / max(total, 1))))


_shared: Any = None
"""In a part's process: the count of all parts, and the signal to stop."""


def _begin(done: Any, stop: Any) -> None:
    global _shared
    _shared = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process then stops the others
    end_with_parent()


class _Stopped(Exception):
    """Another part failed, or the command is interrupted."""


def _report(count: int, _: str) -> None:
    done, stop = _shared
    with done.get_lock():
        done.value += count
    if stop.is_set():
        raise _Stopped


def _do(job: Job, part: Part, workers: int) -> str | None:
    """Do ``job``; returns a user's error as its message, because class and traceback are lost between processes."""
    try:
        job(part, workers, _report)
    except _Stopped:
        pass
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        return str(error)
    return None
