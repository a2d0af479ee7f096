"""Commands one after the other: what they say is shown as it comes, and a signal ends all that they started.

Every command has a session of its own, so that Ctrl-C, or a signal to the process group that this process is in,
reaches this process alone, which asks the command's processes to end (``trainer/sessions.py``); what is not done is
done again the next time.
"""

from __future__ import annotations

import ctypes
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

from launch.demo.screen import Screen
from trainer.sessions import ENDING_SIGNALS, Ending, SignalLog

_TICK_S = 0.25
_LAST_RESORT_S = 30.0
"""What has not ended this long after it was asked to is killed."""
_PR_SET_PDEATHSIG = 1


class Commands:
    """Runs commands until a signal comes: SIGINT, SIGTERM or SIGHUP; the second one kills.

    Attributes:
        signals: how many came.
    """

    def __init__(self) -> None:
        self._log = SignalLog()
        for number in ENDING_SIGNALS:
            signal.signal(number, self._log.note)

    @property
    def signals(self) -> int:
        return len(self._log.numbers)

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
        ending = Ending(process.pid, _LAST_RESORT_S)
        try:
            # The pipe is closed when the last process that holds it has ended: a rank whose launcher is gone, too.
            while (line := self._next(lines)) is not None:
                try:
                    screen.line(line) if line else screen.tick()
                except OSError:  # nobody is there to read: a terminal that was closed, a pipe's other end
                    if not self.signals:
                        self._log.numbers.append(signal.SIGHUP)
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
