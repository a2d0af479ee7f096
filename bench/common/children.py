"""Child commands of a benchmark, started from any thread; they are ended before it ends, so that ranks can save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from trainer.sessions import ENDING_SIGNALS, Ending, SignalLog

_POLL_S = 0.2
_PATIENCE_S = 120.0
"""A command that has not ended this long after the request is killed; ranks may need it to save."""


class Children:
    """Starts commands while it is open; created and closed by the main thread.

    Every command has its own session, so that Ctrl-C reaches only this process. After SIGINT, SIGTERM or SIGHUP no
    further command is started, running ones are asked to end, and once they have, closing ends this process with that
    signal's status. A second signal kills them.

    Attributes:
        signals: received so far.
    """

    def __init__(self) -> None:
        self._log = SignalLog()
        self.signals = self._log.numbers

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._log.note) for number in ENDING_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if signal.SIGINT in self.signals[:1]:
            raise KeyboardInterrupt
        if self.signals:
            name = signal.Signals(self.signals[0]).name
            print(f"stopped by {name}; what was trained is saved, the same command goes on", file=sys.stderr)
            raise SystemExit(128 + self.signals[0])

    def run(self, command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] | None = None) -> int:
        """Run ``command`` to its end; returns its exit status, or that of SIGTERM if it was not started at all.

        Args:
            command: program and arguments.
            log: file for its output; this process's output if None.
            environment: of the command; this process's if None.
        """
        if self.signals:
            return -signal.SIGTERM
        with open(os.devnull if log is None else log, "wb") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if log is None else file,
                stderr=None if log is None else subprocess.STDOUT,
                start_new_session=True,
            )
        ending = Ending(process.pid, _PATIENCE_S)
        try:
            while process.poll() is None or (self.signals and ending.members()):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
                if self.signals:
                    ending.go_on(at_once=len(self.signals) > 1)
        except BaseException:
            ending.kill()
            raise
        return process.wait()
