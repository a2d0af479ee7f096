"""Commands one after the other: what they say is shown as it comes, and a signal ends all that they started.

Every command has a session of its own, so that Ctrl-C, or a signal to the process group that this process is in,
reaches this process alone. It asks the command's processes with SIGTERM: ranks save the step that they are at,
everything else just ends and is done again the next time. The ``deepspeed`` command and its launcher are left to
see that their ranks have ended, because either would end before them, and say so at length.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from launch.demo.screen import Screen

_TICK_S = 0.25
_SAME_S = 2.0
"""Signals within this time of the first are the same one: make passes a SIGTERM on that its process group has had."""
_LAST_RESORT_S = 30.0
"""What has not ended this long after it was asked to is killed."""
_LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch"}
_PR_SET_PDEATHSIG = 1


class Commands:
    """Runs commands until a signal comes: SIGINT, SIGTERM or SIGHUP; the second one kills.

    Attributes:
        signals: how many came.
    """

    def __init__(self) -> None:
        self.signals = 0
        self._first_s = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def run(self, command: Sequence[str], environment: Mapping[str, str], screen: Screen) -> int:
        """Run ``command`` until it and all that it started have ended; returns its exit status."""
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent(),  # noqa: PLW1509  one call into C, which waits for no thread
        )
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        ending = _Ending(process.pid)
        try:
            # The pipe is closed when the last process that holds it has ended: a rank whose launcher is gone, too.
            while (line := self._next(lines)) is not None:
                try:
                    screen.line(line) if line else screen.tick()
                except OSError:  # nobody is there to read: a terminal that was closed, a pipe's other end
                    self.signals = max(self.signals, 1)
                if self.signals and ending.go_on(at_once=self.signals > 1):
                    with suppress(OSError):
                        screen.line("stopping; what was trained is being saved (again: at once, not saved)")
        finally:
            ending.kill()
        return process.wait()

    def _next(self, lines: queue.SimpleQueue[str | None]) -> str | None:
        """The next line, empty if none came for a moment; None after the last one."""
        try:
            return lines.get(timeout=_TICK_S)
        except queue.Empty:
            return ""

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.signals:
            self._first_s = now_s
        if not self.signals or now_s - self._first_s > _SAME_S:
            self.signals += 1


class _Ending:
    """Ends the session ``session``: a command and all that it started, also what has lost its parent."""

    def __init__(self, session: int):
        self._session = session
        self._asked: set[int] = set()
        self._first_s = 0.0

    def go_on(self, at_once: bool) -> bool:
        """Ask those who were not asked yet; kill them ``at_once``, or if they were given time enough.

        True the first time.
        """
        first = not self._first_s
        self._first_s = self._first_s or time.monotonic()
        if at_once or time.monotonic() - self._first_s > _LAST_RESORT_S:
            self.kill()
            return first
        members = self._members()
        workers = [process for process in members if not _is_launcher(process)]
        # A launcher without ranks has none yet, or, if some were asked, is about to see that they have ended.
        for process in workers or ([] if self._asked else members):
            if process.pid not in self._asked:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
                self._asked.add(process.pid)
        return first

    def kill(self) -> None:
        """Kill what is left."""
        for process in self._members():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _members(self) -> list[psutil.Process]:
        """The session's processes, oldest first."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.getsid(process.pid) == self._session:
                    found.append(process)
        return found


def _is_launcher(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(_LAUNCHERS & {Path(word).name for word in process.cmdline()[:4]})
    return False


def _read(pipe: IO[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    with pipe:
        for line in pipe:
            lines.put(line.decode(errors="replace").rstrip())
    lines.put(None)


def _end_with_parent() -> Callable[[], object] | None:
    """For a new process to call: SIGTERM to it when this one dies, even by SIGKILL; None but on Linux.

    Ranks are not the command itself: they see that their launcher is gone (trainer/monitor/orphan.py), save and end.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec as little as possible should happen
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
