"""Delivers reports to one tracker, in a thread, so that training never waits for it.

* The queue is bounded: if a tracker does not answer, what no longer fits is dropped and counted.
* A server that is gone is retried at growing intervals; when it is back it gets the waiting reports.
* The end of a run waits for the rest, for a bounded time; the thread is a daemon, so a call that hangs does not block
  the exit.

Each failure is reported once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from trainer.log import logger_of_run
from trainer.monitor.trackers.interface import Tracker, UnreachableError

ROOM = 1000
"""Most reports that may wait. One is a logged step, an evaluation or a picture, so this is hours of a run that logs
every ten steps."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0


class _Report(NamedTuple):
    method: str
    arguments: tuple[Any, ...]


class TrackerSender:
    """Hands reports to ``tracker``, in their order.

    Args:
        tracker: its methods are called, only from the sender's thread.
        tell: called with a sentence for the user.
        room: most reports that may wait.

    Attributes:
        lost: number of reports lost so far.
    """

    def __init__(self, tracker: Tracker, tell: Callable[[str], None], room: int = ROOM):
        self.tracker, self.tell = tracker, tell
        self.lost = 0
        self._room = room
        self._waiting: queue.SimpleQueue[_Report] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._closing, self._done = threading.Event(), threading.Event()
        self._failing = self._reported_loss = self._off = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def send(self, method: str, *arguments: Any) -> None:
        """Queue a call of the tracker's ``method``; never waits."""
        if self._waiting.qsize() < self._room:
            self._waiting.put(_Report(method, arguments))
            return
        self._lose(1)
        if not self._reported_loss:
            self._reported_loss = True
            self.tell(
                f"{self._name} accepts no reports: {self._room:,} are queued and further ones are dropped; the run "
                "goes on, and metrics.jsonl has all metrics"
            )

    def begin_close(self, phase: str) -> None:
        """Queue the last call; :meth:`end_close` waits for it."""
        self._waiting.put(_Report("close", (phase,)))  # beyond the bound, because it ends the thread
        self._closing.set()

    def end_close(self, deadline_s: float) -> None:
        """Wait until all is delivered, at most until ``deadline_s`` of the monotonic clock, and report what is lost."""
        self._done.wait(max(deadline_s - time.monotonic(), 0.0))
        left = 0 if self._done.is_set() else self._waiting.qsize() + 1
        self._done.set()
        if lost := self.lost + left:
            self.tell(f"{lost:,} reports did not reach {self._name}; metrics.jsonl and the run folder have them all")

    @property
    def _name(self) -> str:
        return f"tracker {self.tracker.name}"

    def _lose(self, count: int) -> None:
        with self._counting:
            self.lost += count

    def _work(self) -> None:
        while not self._done.is_set():
            report = self._waiting.get()
            if self._off or not self._deliver(report):
                self._lose(1)
            if report.method == "close" or (self._off and self._closing.is_set()):
                self._lose(self._waiting.qsize())
                self._done.set()

    def _deliver(self, report: _Report) -> bool:
        """Call the method until it succeeds; False if the report is lost."""
        pause_s = _FIRST_PAUSE_S
        while True:
            last = self._closing.is_set()
            try:
                getattr(self.tracker, report.method)(*report.arguments)
            except UnreachableError as error:
                self._say_failing(f"does not answer ({error}); reports are queued, and the run goes on")
                if last or self._done.is_set():  # at the end only a server that answers is waited for
                    self._off = True
                    return False
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except Exception as error:
                self._off = self._off or report.method == "open"
                logger_of_run().debug("tracker %s, %s", self.tracker.name, report.method, exc_info=True)
                what = "cannot be used" if self._off else f"did not take {report.method}"
                self._say_failing(f"{what} ({_first_line(error)}); the run goes on")
                return False
            else:
                if self._failing and self._waiting.empty():
                    self._failing = False
                    self.tell(f"{self._name} answers again")
                return True

    def _say_failing(self, what: str) -> None:
        if not self._failing and not self._done.is_set():
            self.tell(f"{self._name} {what}")
        self._failing = True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
