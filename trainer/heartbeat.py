"""What every rank reports about itself while it runs: ``RUN/heartbeat/rank-N.json``, rewritten every two seconds, or
less often with many ranks.

Two different things stop when a run goes wrong, so both are reported: ``beat`` counts up as long as the process can run
at all, ``still_s`` grows while it makes no progress. A rank that waits for another still beats; one that was killed or
frozen does not.

Clocks of different hosts are never compared: ``still_s`` is measured by the rank's own monotonic clock, and a reader
sees that a rank is alive by reading its heartbeat twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

BEAT_EVERY_S = 2.0
"""Seconds between two writes, at least."""
_BEATS_PER_S = 128
"""Most writes per second by all ranks together: as many as one file per node of 8 GPUs every two seconds at 2,048
ranks. Each write creates and renames a file in one folder of a shared file system."""
FINAL = ("ended", "stopped", "stalled", "failed", "lost")
"""Phases after which a rank is silent: all steps done, asked to stop and saved, no progress, an error, and the error of
a rank that lost another one."""


@dataclass(frozen=True)
class Beat:
    """One rank's heartbeat.

    Attributes:
        rank, host, pid: which process it is.
        beat: how many times this process has written it.
        step: optimiser steps done.
        phase: starting, loading (waiting for data), training, saving, evaluating, or one of ``FINAL``.
        before: the phase before that: what a rank was doing when it stalled or failed.
        still_s: seconds without progress.
        time: by the rank's own clock, seconds since 1970; for human readers.
        every_s: seconds between two writes of a healthy rank.
    """

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    phase: str
    before: str
    still_s: float
    time: float
    every_s: float = BEAT_EVERY_S

    @property
    def doing(self) -> str:
        """The phase, or for a rank that has ended the one it ended in."""
        return self.before if self.phase in FINAL else self.phase


class Heartbeat:
    """This rank's heartbeat. Progress is noted without touching a file, so a slow file system delays no step."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"rank-{rank}.json"
        self.every_s = BEAT_EVERY_S
        self.rank, self.step, self.phase, self.before = rank, 0, "starting", "starting"
        self._written = 0
        self._progress_s = time.monotonic()

    @property
    def still_s(self) -> float:
        """Seconds without progress."""
        return time.monotonic() - self._progress_s

    def note(self, step: int, phase: str) -> None:
        """Record progress: this rank is now in ``phase`` at ``step``."""
        if phase != self.phase:
            self.before = self.phase
        self.step, self.phase = step, phase
        self.tick()

    def tick(self) -> None:
        """Record progress within a phase: a micro-batch of training or evaluation."""
        self._progress_s = time.monotonic()

    def write(self) -> None:
        """Write the heartbeat file; errors are ignored, as the checkpoint reports a full disk."""
        self._written += 1
        still_s, host = round(self.still_s, 1), socket.gethostname()
        beat = Beat(
            self.rank, host, os.getpid(), self._written, self.step, self.phase, self.before, still_s, time.time(),
            self.every_s,
        )  # fmt: skip
        # No fsync: a heartbeat lost in a power cut does no harm.
        temporary = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(beat)))
            temporary.replace(self.path)


def beat_every_s(ranks: int) -> float:
    """Seconds between two writes of each of ``ranks`` ranks."""
    return max(BEAT_EVERY_S, ranks / _BEATS_PER_S)


def read_beats(folder: Path) -> list[Beat]:
    """The heartbeats of all ranks, in rank order; files that cannot be read are left out."""
    beats = []
    names = [field.name for field in fields(Beat)]
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            written = json.loads(path.read_text())
            beats.append(Beat(**{name: written[name] for name in names}))
    return sorted(beats, key=lambda beat: beat.rank)


def behind(beats: list[Beat]) -> list[Beat]:
    """The ranks that the others wait for, judged by their steps: all that have not reached the furthest step and phase.

    Ranks load, then train: of two at the same step the one still loading is behind.
    """
    order = {"starting": 0, "loading": 1}
    places = {beat.rank: (beat.step, order.get(beat.doing, 2)) for beat in beats}
    furthest = max(places.values(), default=(0, 0))
    return [beat for beat in beats if places[beat.rank] < furthest]
