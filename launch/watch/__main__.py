"""Status of a run, read from its folder: no server, from any machine that sees the folder.

    python -m launch.watch runs/my                              # on a terminal: a page that refreshes itself
    python -m launch.watch runs/my --interval 60 >> watch.log   # in a log: a line a minute, to the run's end
    python -m launch.watch runs/my --once                       # one report

Exit status: 0 when the run has ended or, with --once, is still running; 75 when it was asked to stop and is saved; 76
when it stalled, lost a rank, or some of its ranks are silent; 1 when it failed, or all of its ranks are silent.

A rank is alive if its heartbeat changes while being watched, timed by the watcher alone: clocks are not compared, so a
clock that jumps neither looks like a stall nor hides one.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from launch.watch.report import Report, line, page
from launch.watch.sources import Figures, read_checkpoint, read_figures, read_steps
from settings import command_parser, path_argument, positive_number, user_errors
from trainer.exit_status import EXIT_PREEMPTED, EXIT_STALLED
from trainer.heartbeat import BEAT_EVERY_S, FINAL, Beat, read_beats
from trainer.monitor import metrics_file

STATUS = {"ended": 0, "stopped": EXIT_PREEMPTED, "stalled": EXIT_STALLED, "lost": EXIT_STALLED, "failed": 1}
"""Exit status by final state; 0 while the run goes on."""
_GLANCE_S, _DAY_S = 0.5, 86_400.0
_MISSED = 3
"""Heartbeats that a rank may miss if it writes them less often than usual."""
_LAST_LINES = 20


class Watch:
    """Polls a run folder.

    Args:
        folder: of the run.
        patience_s: how long a rank may be silent before it counts as lost.

    Raises:
        ValueError: if ``folder`` is no run.
    """

    def __init__(self, folder: Path, patience_s: float):
        self.folder, self.patience_s = folder, patience_s
        self.steps = read_steps(folder)
        self._began_s = time.monotonic()
        self._heard: dict[int, tuple[tuple[int, int], float]] = {}
        """By rank: process and beat last seen, and when that changed."""
        self._moved: set[int] = set()

    def look(self) -> Report:
        """The run as it is now."""
        now_s = time.monotonic()
        beats = read_beats(self.folder / "heartbeat")
        for beat in beats:
            seen = (beat.pid, beat.beat)
            before = self._heard.get(beat.rank)
            if before is None or before[0] != seen:
                self._heard[beat.rank] = (seen, now_s)
                self._moved |= set() if before is None else {beat.rank}
        heard_s = {beat.rank: now_s - self._heard[beat.rank][1] for beat in beats}
        # With thousands of ranks each writes less often.
        patience_s = max([self.patience_s, *(_MISSED * beat.every_s for beat in beats if beat.every_s > BEAT_EVERY_S)])
        silent = {b.rank for b in beats if b.phase not in FINAL and heard_s[b.rank] > patience_s}
        waited = now_s - self._began_s > patience_s
        figures = read_figures(self.folder / metrics_file.NAME, _LAST_LINES)
        state = state_of(beats, silent, waited)
        return Report(
            run=str(self.folder),
            state=state,
            steps=self.steps,
            beats=beats,
            heard_s=heard_s,
            silent=silent,
            figures=figures,
            left_s=None if state in FINAL else time_left_s(self.steps, beats, figures),
            checkpoint=read_checkpoint(self.folder, alive=bool(self._moved)),
        )

    def settled(self, report: Report) -> bool:
        """True if watching longer would not change the state: every rank has ended, moved or is lost."""
        if report.state in STATUS:
            return True
        waiting = {beat.rank for beat in report.beats if beat.phase not in FINAL} - self._moved - report.silent
        return bool(report.beats) and not waiting


def state_of(beats: list[Beat], silent: set[int], waited: bool) -> str:
    """starting, running, evaluating, saving, or one of ``FINAL``.

    Args:
        beats: of all ranks.
        silent: ranks that have not ended but whose heartbeats have stopped.
        waited: whether the watcher has waited long enough to treat missing heartbeats as a failure.
    """
    phases = {beat.phase for beat in beats}
    if not beats:
        return "failed" if waited else "starting"
    for phase in ("stalled", "failed", "lost"):
        if phase in phases:
            return phase
    going_on = [beat for beat in beats if beat.phase not in FINAL]
    if not going_on:
        return "stopped" if "stopped" in phases else "ended"
    if silent:
        return "failed" if len(silent) == len(going_on) else "stalled"
    phase = going_on[0].phase
    return "running" if phase in ("loading", "training") else phase


def time_left_s(steps: int, beats: list[Beat], figures: Figures) -> float | None:
    """Seconds to the last step at the median pace of the last log lines, without saving and evaluating."""
    if not beats or not figures.step_s:
        return None
    return max(steps - min(beat.step for beat in beats), 0) * statistics.median(figures.step_s)


def main() -> int:
    """Report until the run is over, or once."""
    parser = command_parser("launch.watch", __doc__)
    parser.add_argument("run", type=path_argument, help="run folder: train.run_dir, for example runs/demo")
    parser.add_argument(
        "--interval", type=positive_number(_DAY_S), default=5.0, metavar="S", help="seconds between reports (5)"
    )
    parser.add_argument("--once", action="store_true", help="report once and exit")
    parser.add_argument(
        "--patience",
        type=positive_number(_DAY_S),
        default=60.0,
        metavar="S",
        help="seconds without a new heartbeat after which a rank counts as lost (60); ranks write one every two, "
        "above 256 ranks one every N/128, of which three may be missed; a network file system may show it late",
    )
    arguments = parser.parse_args()
    with user_errors():
        watch = Watch(arguments.run, arguments.patience)
        report = _once(watch) if arguments.once else _follow(watch, arguments.interval)
    return STATUS.get(report.state, 0)


def _once(watch: Watch) -> Report:
    while not watch.settled(report := watch.look()):
        time.sleep(_GLANCE_S)
    print(page(report))
    return report


def _follow(watch: Watch, interval_s: float) -> Report:
    """Report every ``interval_s`` until the run is over."""
    terminal = sys.stdout.isatty()
    while True:
        report = watch.look()
        # Home, then clear to the end: the page is redrawn in place.
        print(f"\x1b[H\x1b[J{page(report)}" if terminal else line(report), flush=True)
        if report.state in STATUS:
            return report
        time.sleep(interval_s)


if __name__ == "__main__":
    raise SystemExit(main())
