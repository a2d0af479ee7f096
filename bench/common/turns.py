"""Turns for whole training loops: each contestant has its own processes, and only one contestant runs at a time.

The command and the ranks it has started share a store. Before each step a rank checks whether its turn is over; if so,
it reports its measurements and waits, without using the CPU, until the command gives it further steps. So start-up is
paid once, and neighbouring turns can be compared as within one process (``bench/common/timing.py``).

    rank      begin(0)  waits ......... begin(1) begin(2) begin(3)  waits ............
    command             give(3)                                     elapsed_s, next contestant
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
PATIENCE = timedelta(hours=6)
"""How long a rank waits for its turn; if the command dies, the wait fails at once."""
_POLL_S = 0.002
_TO_END_S = 30.0


class TurnsOverError(Exception):
    """No further steps will be given: the rank leaves its loop."""


class Turn:
    """The rank's side.

    Args:
        port: of the command's store.
        name: of the contestant.
        rank: this process within it.
    """

    def __init__(self, port: int, name: str, rank: int):
        from torch.distributed import TCPStore

        self._store = TCPStore(HOST, port, is_master=False, timeout=PATIENCE)
        self._key = f"{name}/{rank}"
        self._go = f"{name}/go"
        self._number = 0
        self._until = 0
        self._began_s: list[float] = []

    def begin(self, step: int, report: Callable[[], dict[str, Any]]) -> None:
        """Continue with ``step`` (0 is the first) once it is this contestant's turn.

        Args:
            step: optimiser steps done.
            report: called at the end of a turn, within its measured time: finishes the turn's work and returns metrics.

        Raises:
            TurnsOverError: if no further steps will be given.
        """
        now = time.perf_counter()
        self._began_s.append(now)
        if step < self._until:
            return
        reports = {**report(), "steps_s": [b - a for a, b in zip(self._began_s, self._began_s[1:], strict=False)]}
        self._store.set(f"{self._key}/{self._number}", json.dumps(reports))
        go = f"{self._go}/{self._number}"
        self._store.wait([go], PATIENCE)
        steps = int(self._store.get(go))
        if not steps:
            raise TurnsOverError
        self._number, self._until = self._number + 1, step + steps
        self._began_s = [time.perf_counter()]


@dataclass
class TurnTaker:
    """A contestant's processes.

    Attributes:
        name: of the contestant.
        ranks: how many processes take steps.
        process: the launcher, which leads a session.
        log: file of their output.
        turns: how many turns they were given.
    """

    name: str
    ranks: int
    process: subprocess.Popen[bytes]
    log: Path
    turns: int = 0


class Turns:
    """The command's side: start contestants, and give one of them steps at a time. Leaves no process behind."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self.contestants: dict[str, TurnTaker] = {}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        for contestant in self.contestants.values():
            if contestant.process.poll() is None:
                os.killpg(contestant.process.pid, signal.SIGKILL)
                contestant.process.wait()

    @property
    def port(self) -> int:
        """Port of the store, for :class:`Turn`."""
        return int(self._store.port)

    def start(
        self, name: str, command: Sequence[str], environment: dict[str, str], ranks: int, log: Path
    ) -> tuple[float, list[dict[str, Any]]]:
        """Start a contestant and wait until all its ranks have reached their first step.

        Returns:
            Seconds that it took, and what each rank reports.

        Raises:
            ValueError: with its error or last line of output if it exits instead.
        """
        start_s = time.perf_counter()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        contestant = self.contestants[name] = TurnTaker(name, ranks, process, log)
        reports = self._reports(contestant)
        return time.perf_counter() - start_s, reports

    def give(self, name: str, steps: int) -> tuple[float, list[dict[str, Any]]]:
        """Let a contestant take ``steps`` steps.

        Returns:
            Seconds until the last of its ranks had done them, and what each reports.

        Raises:
            ValueError: with its error or last line of output if it exits instead.
        """
        contestant = self.contestants[name]
        start_s = time.perf_counter()
        self._store.set(f"{name}/go/{contestant.turns}", str(steps))
        contestant.turns += 1
        reports = self._reports(contestant)
        return time.perf_counter() - start_s, reports

    def end(self) -> None:
        """Have all contestants leave their loops.

        Raises:
            ValueError: if one fails or does not end in time.
        """
        for name, contestant in self.contestants.items():
            self._store.set(f"{name}/go/{contestant.turns}", "0")
        for contestant in self.contestants.values():
            try:
                status = contestant.process.wait(_TO_END_S)
            except subprocess.TimeoutExpired:
                raise ValueError(
                    f"{contestant.name} did not end within {_TO_END_S:.0f} s: {last_words(contestant.log, 0)}"
                ) from None
            if status:
                raise ValueError(f"{contestant.name}: {last_words(contestant.log, status)}")

    def _reports(self, contestant: TurnTaker) -> list[dict[str, Any]]:
        keys = [f"{contestant.name}/{rank}/{contestant.turns}" for rank in range(contestant.ranks)]
        while not self._store.check(keys):
            status = contestant.process.poll()
            if status is not None:
                raise ValueError(f"{contestant.name}: {last_words(contestant.log, status)}")
            time.sleep(_POLL_S)
        return [json.loads(self._store.get(key)) for key in keys]


def last_words(log: Path, status: int) -> str:
    """An ended process's last ``error:`` line, after which launchers print more, or else its last line of output."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return ([f"no output, status {status}", *lines, *errors])[-1].strip()
