"""A thread beside the training loop that detects what the loop cannot: that it hangs, or that its launcher is gone.

* It writes the heartbeat (``trainer/heartbeat.py``).
* No progress for ``train.stall_timeout_s``: it writes the Python stack of every thread to this rank's log and ends the
  process with status 76, so that a launcher ends the others and a scheduler can start the run again. One rank that
  hangs makes all others wait in a collective, so all of them notice, and the one whose stack is elsewhere is the
  culprit. The first of them reads all heartbeats and reports which ranks are behind. It is a thread because Python runs
  no signal handler while the main thread waits in a collective.
* The launcher is gone (``orphan.py``), or the run folder was removed: it asks the run to stop, as a signal would. The
  weights are still in memory, so they are saved in a new folder.
* Native code crashes, such as when a memory-mapped file is truncated: the stacks go to this rank's log.

A process that cannot run Python at all, not even this thread (native code that hangs and holds the GIL, a file system
that hangs under the heartbeat), is ended by a ``faulthandler`` timer, with the stacks on stderr.

    kill -USR2 PID        # writes the stacks to RUN/logs/rank-N.log; the run continues
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

from trainer import flight_recorder
from trainer.exit_status import EXIT_STALLED
from trainer.heartbeat import BEAT_EVERY_S, FINAL, Beat, beat_every_s, behind, read_beats
from trainer.monitor.orphan import LAUNCHER, is_gone
from trainer.run_folder import RunFolder

_LINGER_S = 6.0
"""Least time between a rank's dump and its exit. If it exited at once, the others' collectives would fail before they
could report where they hang; and live ranks write another heartbeat meanwhile.

``faulthandler`` fires after the same time again: after the other ranks, whose exit status says more, have ended, and
before launcher or scheduler, which give a rank 30 seconds, kill the one that hangs."""
_SPOKESMAN = "stall"
"""File in the heartbeats' folder, created by the one rank that reports on all."""
_NAMED = 8
"""Most ranks that a sentence names."""


class Watchdog:
    """Watches one rank from :meth:`start` to :meth:`stop`.

    Args:
        run: its run folder.
        stall_timeout_s: longest time without progress.
        ask_to_stop: called once if launcher or run folder is gone; returns whether this was the first request.
        ranks: number of ranks that write heartbeats.
    """

    def __init__(self, run: RunFolder, stall_timeout_s: float, ask_to_stop: Callable[[], bool], ranks: int = 1):
        self.run, self.stall_timeout_s, self.ask_to_stop = run, stall_timeout_s, ask_to_stop
        self._every_s = min(BEAT_EVERY_S, stall_timeout_s / 4)
        every_s = run.heartbeat.every_s = beat_every_s(ranks)
        self._pauses_s = chain([every_s * (run.rank + 1) / ranks], repeat(every_s))  # not all of them at once
        self._next_s = 0.0
        self._linger_s = max(_LINGER_S, 1.25 * every_s)
        self._file = open(run.log, "ab", buffering=0)  # noqa: SIM115  open as long as a stack may be written
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching; what came before, such as loading a checkpoint, is not counted."""
        self.run.heartbeat.tick()
        faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)
        faulthandler.enable(self._file)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, as after the last step."""
        self._over.set()
        self._thread.join(_LINGER_S)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        asked = False
        while True:
            faulthandler.dump_traceback_later(self.stall_timeout_s + 2 * self._linger_s, exit=True, file=2)
            due = self._is_due()
            if due:
                self.run.heartbeat.write()
            if not asked and (reason := self._reason_to_stop(due)):
                asked = True
                if self.ask_to_stop():
                    self._say(f"{reason}: this rank asks to stop, as on SIGTERM")
            if self.run.heartbeat.still_s > self.stall_timeout_s:
                self._end()
            if self._over.wait(self._every_s):
                return

    def _is_due(self) -> bool:
        """Whether to access the run folder's file system again; with many ranks each does so less often."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + (next(self._pauses_s) if self.run.heartbeat.every_s > self._every_s else 0.0)
        return True

    def _reason_to_stop(self, look: bool) -> str | None:
        """Why this rank should ask to stop, if so; the run folder is only checked if it may ``look``."""
        if LAUNCHER and is_gone(LAUNCHER):
            return "the launcher is gone"
        if not look:
            return None
        with contextlib.suppress(OSError):  # a file system that does not answer has not lost the folder
            beats = self.run.heartbeat.path.parent
            # Checked twice: on a network file system it may be missing for a moment.
            if not beats.is_dir() and (self._over.wait(1.0) or not beats.is_dir()):
                return (
                    f"the run folder {self.run.path} is gone, with its contents; a checkpoint of the current state is "
                    "written there"
                )
        return None

    def _end(self) -> None:
        heartbeat, folder = self.run.heartbeat, self.run.heartbeat.path.parent
        self._write(f"no progress for {heartbeat.still_s:.0f} s; the stacks of all threads:")
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self._file, all_threads=True)
        heartbeat.note(heartbeat.step, "stalled")
        heartbeat.write()
        flight = flight_recorder.dump(self.run.path, self.run.rank)
        if _is_first(folder):
            earlier = read_beats(folder)
            time.sleep(self._linger_s)
            sentence = stall_sentence(earlier, read_beats(folder), self.stall_timeout_s)
        else:
            time.sleep(self._linger_s)
            sentence = f"{stall_sentence([], [], self.stall_timeout_s)}; another rank says which are behind"
        collectives = f", NCCL's last collectives are in {flight}" if flight else ""
        self._say(f"{sentence}; its stacks are in {self.run.log}{collectives}")
        os._exit(EXIT_STALLED)

    def _say(self, sentence: str) -> None:
        """Write to the log and stderr."""
        self._write(sentence)
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, f"rank {self.run.rank}: {sentence}\n".encode())

    def _write(self, sentence: str) -> None:
        """Write to the log without the logger, whose lock a main thread that hangs in a write holds."""
        with contextlib.suppress(OSError):
            self._file.write(f"{time.strftime('%F %T')} WARNING {sentence}\n".encode())


def _is_first(folder: Path) -> bool:
    """Whether this rank is the first that wants to read all heartbeats; the folder is emptied at every start."""
    try:
        (folder / _SPOKESMAN).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a disk that cannot be written may still be readable
        pass
    return True


def stall_sentence(earlier: list[Beat], now: list[Beat], stall_timeout_s: float) -> str:
    """What a stalled rank reports about all ranks, from their heartbeats at two moments more than one beat apart."""
    counts = {beat.rank: beat.beat for beat in earlier}
    silent = [b for b in now if b.phase not in FINAL and b.beat == counts.get(b.rank)]
    late = [beat for beat in behind(now) if beat not in silent]
    parts = [f"no progress for train.stall_timeout_s ({stall_timeout_s:g} s)"]
    if late:
        parts.append(f"behind: {_names(late)}")
    if silent:
        parts.append(f"no longer heard from, so frozen, killed or cut off: {_names(silent)}")
    if not late and not silent and len(now) > 1:
        parts.append(f"all {len(now)} ranks are at step {now[0].step:,}; the culprit's stack is the one that differs")
    return "; ".join(parts)


def _names(beats: list[Beat]) -> str:
    """The first few of ``beats`` with their places."""
    first = ", ".join(f"rank {b.rank} on {b.host} (step {b.step:,}, {b.doing})" for b in beats[:_NAMED])
    return first if len(beats) <= _NAMED else f"{first} and {len(beats) - _NAMED} more"
