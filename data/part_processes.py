"""Work through parts with all cores: a process for each part, which reads and tokenizes.

Where there are fewer parts than cores, a part's process only reads, and processes of its own tokenize.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data.encode import Encoder, end_with_parent
from data.parts import Part
from data.prepare_part import prepare_part
from data.progress import Progress
from data.tokenization import load_text_tokenizer
from settings import counted
from settings.user_errors import is_users

_LOOK_EVERY_S = 0.5


class PartProcesses:
    """Prepares parts with ``workers`` processes; with 1, in this process."""

    def __init__(self, folder: str, shard_tokens: int, workers: int) -> None:
        """``folder`` holds the tokenizer."""
        self._folder, self._shard_tokens, self._workers = folder, shard_tokens, workers

    def prepare(self, parts: Sequence[Part]) -> None:
        """Prepare all ``parts``, the largest first.

        Raises:
            ValueError: see :func:`data.prepare_part.prepare_part`; the other parts stop, and keep what they finished.
        """
        waiting = sorted(parts, key=lambda part: -part.bytes)
        if self._workers == 1 or len(waiting) == 1:
            for part in waiting:
                with Encoder(self._folder, self._workers) as encoder, Progress(part.source.config.name) as progress:
                    tokenizer = load_text_tokenizer(self._folder)
                    prepare_part(part, self._shard_tokens, tokenizer, encoder, progress.add)
        elif waiting:
            self._share_out(waiting)

    def _share_out(self, waiting: list[Part]) -> None:
        # Fresh processes: a fork would copy the threads' locks of the libraries that read the sources.
        context = multiprocessing.get_context("spawn")
        tokens, stop = context.Value("q", 0), context.Event()
        count, free, before = len(waiting), self._workers, 0
        running: dict[Future[str | None], int] = {}
        pool = ProcessPoolExecutor(
            min(self._workers, count), mp_context=context, initializer=_begin, initargs=(tokens, stop)
        )
        try:
            with Progress(counted(count, "part")) as progress:
                while waiting or running:
                    while waiting and free:
                        part = waiting.pop(0)
                        processes = _processes(part, waiting, free)
                        future = pool.submit(_prepare, part, self._folder, self._shard_tokens, processes)
                        running[future] = processes
                        free -= processes
                    for future in wait(running, _LOOK_EVERY_S, FIRST_COMPLETED).done:
                        free += running.pop(future)
                        if (mistake := future.result()) is not None:
                            raise ValueError(mistake)
                    now = tokens.value
                    done = count - len(waiting) - len(running)
                    progress.add(now - before, f"{done} of {count} parts done")
                    before = now
        except BrokenProcessPool:
            raise ValueError(
                "a process that prepares a part was killed, probably for memory; start again with fewer than "
                f"{self._workers} --workers, finished shards are kept"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _processes(part: Part, waiting: Sequence[Part], free: int) -> int:
    """How many of the ``free`` processes a part gets: its share of the bytes that are still to be begun."""
    total = part.bytes + sum(other.bytes for other in waiting)
    return min(free, max(1, round(free * part.bytes / max(total, 1))))


_shared: Any = None
"""In a part's process: the counter of tokens of all parts, and whether they shall stop."""


def _begin(tokens: Any, stop: Any) -> None:
    global _shared
    _shared = tokens, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process then stops the others
    end_with_parent()


class _Stopped(Exception):
    """Another part failed, or the command is interrupted."""


def _prepare(part: Part, folder: str, shard_tokens: int, workers: int) -> str | None:
    """Prepare ``part``; returns a user's mistake as a sentence, because its class and place do not survive the way."""

    def report(tokens: int, _: str) -> None:
        counter, stop = _shared
        with counter.get_lock():
            counter.value += tokens
        if stop.is_set():
            raise _Stopped

    try:
        with Encoder(folder, workers) as encoder:
            prepare_part(part, shard_tokens, load_text_tokenizer(folder), encoder, report)
    except _Stopped:
        pass
    except (ValueError, OSError) as error:
        if not is_users(error):
            raise
        return str(error)
    return None
