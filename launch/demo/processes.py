"""Runs commands one after the other: their output is shown live, and a signal ends all their processes.

Every command has its own session, so that Ctrl-C, or a signal to this process's group, reaches only this process, which
asks the command's processes to end (``trainer/sessions.py``); unfinished stages are run again the next time.
"""

from __future__ import annotations

import ctypes
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

from launch.demo.screen import Screen
from trainer.exit_status import EXIT_PREEMPTED
from trainer.sessions import ENDING_SIGNALS, Ending, SignalLog

_TICK_S = 0.25
_LAST_RESORT_S = 30.0
"""Processes that have not ended this long after the request are killed."""
_PR_SET_PDEATHSIG = 1
_SAVING = "stopping and saving what was trained (stop again to end at once, unsaved)"
_STOPPING = "stopping (stop again to end at once)"
_OWN_ENDING = re.compile(rf"; go on with: .*|.*sigkill_handler\].* return code = {EXIT_PREEMPTED}$")
"""In the output of a command that was asked to stop: how to resume that command alone, and the ``deepspeed`` launcher's
report that a rank has stopped. The demo says itself how it is resumed."""


class Commands:
    """Runs commands until a signal arrives: SIGINT, SIGTERM or SIGHUP; the second one kills.

    Attributes:
        signals: how many have arrived.
    """

    def __init__(self) -> None:
        self._log = SignalLog()
        for number in ENDING_SIGNALS:
            signal.signal(number, self._log.note)

    @property
    def signals(self) -> int:
        return len(self._log.numbers)

    def run(self, command: Sequence[str], environment: Mapping[str, str], screen: Screen) -> int:
        """Run ``command`` until all its processes have ended; returns its exit status."""
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
            # The pipe closes when the last process that holds it has ended, including ranks whose launcher is gone.
            while (line := self._next(lines)) is not None:
                if self.signals:
                    line = _OWN_ENDING.sub("", line)
                try:
                    screen.line(line) if line else screen.tick()
                except OSError:  # no reader: the terminal, or the other end of the pipe, is closed
                    if not self.signals:
                        self._log.numbers.append(signal.SIGHUP)
                if self.signals and ending.go_on(at_once=self.signals > 1):
                    with suppress(OSError):
                        screen.line(_SAVING if screen.has_advanced else _STOPPING)
        finally:
            ending.kill()
        return process.wait()

    def _next(self, lines: queue.SimpleQueue[str | None]) -> str | None:
        """The next line, empty if none came within a tick; None after the last one."""
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
    """For a new process to call: it then gets SIGTERM when this one dies, even by SIGKILL; None except on Linux.

    This does not reach ranks: they notice that their launcher is gone (trainer/monitor/orphan.py), save and end.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here, to do as little as possible between fork and exec
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
