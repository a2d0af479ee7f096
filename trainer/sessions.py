"""Ending a session of processes (a command and everything it started) when this process is asked to end.

On SIGTERM ranks save their current step; everything else just ends. The ``deepspeed`` command and its launcher are not
signalled but left to see that their ranks have ended: signalled, either would end before them, with many lines of
output.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

_LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torch.distributed.run"}
_SAME_SIGNAL_S = 2.0
"""Signals within this time of the first count as the same one: make and timeout forward a SIGTERM that their process
group has already received."""
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalLog:
    """Remembers the signals that ask this process to end.

    Attributes:
        numbers: the signals received, repeats of the same one counted once.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._first_s = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        now_s = time.monotonic()
        if not self.numbers:
            self._first_s = now_s
        if not self.numbers or now_s - self._first_s > _SAME_SIGNAL_S:
            self.numbers.append(number)


class Ending:
    """Ends the session ``session``, orphaned processes included.

    Args:
        session: process id of the session leader.
        patience_s: how long after the first request what is left is killed.
    """

    def __init__(self, session: int, patience_s: float):
        self._session, self._patience_s = session, patience_s
        self._asked: set[int] = set()
        self._first_s = 0.0

    def go_on(self, at_once: bool) -> bool:
        """Ask processes to end that were not asked yet; kill them if ``at_once``, or if they have had enough time.

        True the first time.
        """
        first = not self._first_s
        self._first_s = self._first_s or time.monotonic()
        if at_once or time.monotonic() - self._first_s > self._patience_s:
            self.kill()
            return first
        members = self.members()
        workers = [process for process in members if not _is_launcher(process)]
        # A launcher without ranks has not started any or, if some were asked, is about to see that they have ended.
        for process in workers or ([] if self._asked else members):
            if process.pid not in self._asked:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
                self._asked.add(process.pid)
        return first

    def kill(self) -> None:
        """Kill what is left."""
        for process in self.members():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def members(self) -> list[psutil.Process]:
        """The session's processes, oldest first."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self._session and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def _is_launcher(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(_LAUNCHERS & {Path(word).name for word in process.cmdline()[:4]})
    return False
