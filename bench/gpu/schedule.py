"""Parts one after the other within a limited time, the most valuable first.

    time left   |== facts ==|==== tests ====|=== training ===|== step ==| ...      shares go by weight
    ends early        |======= tests =======|==== training =====|=== step ===|     the time it saved is shared again
    hangs                   |..............x| killed at its limit, the next one starts

Each part is a command in its own process group, with a log. However it ends, the whole group is killed; at its limit it
is first asked for its stacks (``PYTHONFAULTHANDLER`` answers SIGABRT with those of all threads).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

PASSED, FAILED, OUT_OF_TIME, STOPPED = "passed", "failed", "out of time", "stopped"
RUNNING, WAITING, NOT_REACHED = "running", "waiting", "not reached"
_GRACE_S = 3.0
"""Between a signal to a part and SIGKILL to its group."""
_POLL_S = 0.1
_LAST_LINES = 30
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Figures:
    """Results of a part.

    Attributes:
        key: the figures that matter most, in a phrase.
        rows: a table; all rows have the same columns.
    """

    key: str
    rows: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: also names its files.
        what: it shows, in a sentence.
        command: what to start.
        weight: its share of the time, relative to the others'.
        least_s: it is not started with less time than this.
        read: makes its figures from its parsed JSON file (None if it writes none) and the text of its log.
        needed: if it fails, no other part can pass and none is started.
    """

    name: str
    what: str
    command: tuple[str, ...]
    weight: float
    least_s: float
    read: Callable[[Any, str], Figures]
    needed: bool = False


@dataclass
class Outcome:
    """How a part went.

    Attributes:
        part: the part that ran.
        status: one of the constants above.
        seconds: that it took.
        limit_s: that it was allowed.
        reason: why it did not pass, in a phrase.
        figures: its results, even if it failed after writing them.
        last_lines: of its log, if it did not pass.
    """

    part: Part
    status: str = WAITING
    seconds: float = 0.0
    limit_s: float = 0.0
    reason: str = ""
    figures: Figures | None = None
    last_lines: list[str] = field(default_factory=list)


def figures_file(out: Path, name: str) -> Path:
    """Where a part writes its results."""
    return out / f"{name}.json"


def log_file(out: Path, name: str) -> Path:
    """Where everything that a part prints goes."""
    return out / f"{name}.log"


class Schedule:
    """Runs parts until all are done, the time is up or a signal arrives.

    Args:
        parts: the most valuable first.
        out: folder of logs and figures.
        deadline_s: of ``time.monotonic()``.
        environment: of the parts.
        folder: working directory of the parts.
        tell: called before and after each part.

    Attributes:
        outcomes: one per part.
        signal: the first one received, 0 if none.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        out: Path,
        deadline_s: float,
        environment: Mapping[str, str],
        folder: Path,
        tell: Callable[[Schedule], object],
    ):
        self.outcomes = [Outcome(part) for part in parts]
        self.signal = 0
        self._out, self._deadline_s = out, deadline_s
        self._environment, self._folder, self._tell = environment, folder, tell

    @property
    def passed(self) -> bool:
        """Whether every part passed."""
        return all(outcome.status == PASSED for outcome in self.outcomes)

    def run(self) -> None:
        """Run all parts, each within its limit."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            for number, outcome in enumerate(self.outcomes):
                self._take(outcome, self.outcomes[number:])
                self._tell(self)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def _take(self, outcome: Outcome, left: Sequence[Outcome]) -> None:
        """Run one part unless stopped, blocked or out of time; ``left`` are the parts not yet run, this one first."""
        part = outcome.part
        broken = [o.part.name for o in self.outcomes if o.part.needed and o.status == FAILED]
        left_s = self._deadline_s - _GRACE_S - time.monotonic()
        if self.signal or broken or left_s < part.least_s:
            outcome.status = NOT_REACHED
            too_late = f"takes {part.least_s:.0f} s at least, and {max(left_s, 0):.0f} s were left"
            outcome.reason = self._stopped() if self.signal else f"needs {broken[0]}" if broken else too_late
            return
        share = part.weight / sum(o.part.weight for o in left)
        outcome.limit_s = min(max(left_s * share, part.least_s), left_s)
        outcome.status = RUNNING
        self._tell(self)
        began_s = time.monotonic()
        self._run(outcome, began_s + outcome.limit_s)
        outcome.seconds = time.monotonic() - began_s
        self._judge(outcome)

    def _run(self, outcome: Outcome, limit_s: float) -> None:
        """Start the part's command and wait for its end, its limit or a signal."""
        with log_file(self._out, outcome.part.name).open("wb") as log:
            process = subprocess.Popen(
                outcome.part.command,
                cwd=self._folder,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None and not self.signal and time.monotonic() < limit_s:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_S)
                status = process.poll()
            finally:
                end_group(process, signal.SIGTERM if self.signal else signal.SIGABRT)
        if status is not None:
            outcome.status = FAILED if status else PASSED
            outcome.reason = f"exit status {status}" if status else ""
        elif self.signal:
            outcome.status, outcome.reason = STOPPED, self._stopped()
        else:
            outcome.status, outcome.reason = OUT_OF_TIME, f"killed after {outcome.limit_s:.0f} s"

    def _judge(self, outcome: Outcome) -> None:
        """Read the part's results and log, and complete its outcome."""
        path = figures_file(self._out, outcome.part.name)
        text = log_file(self._out, outcome.part.name).read_text(errors="replace")
        writes = str(path) in outcome.part.command
        found = None
        with suppress(OSError, ValueError):  # missing, or truncated when the part ended
            found = json.loads(path.read_text(encoding="utf-8"))
        if found is not None or (not writes and outcome.status == PASSED):
            outcome.figures = outcome.part.read(found, text)
        elif outcome.status == PASSED:
            outcome.status, outcome.reason = FAILED, f"ended without an error, but without {path.name}"
        if outcome.status != PASSED:
            lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines() if line.strip()]
            outcome.last_lines = lines[-_LAST_LINES:]

    def _stopped(self) -> str:
        return f"stopped by {signal.Signals(self.signal).name}"


def end_group(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    """End the group that ``process`` leads: send ``first`` while the leader is alive, then SIGKILL to what is left."""
    if process.poll() is None:
        if first == signal.SIGABRT:
            process.send_signal(first)
        else:
            os.killpg(process.pid, first)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
