"""A run at one moment, as a page for a terminal or a line for a log."""

from __future__ import annotations

import time
from dataclasses import dataclass

from launch.watch.sources import Figures
from settings.words import duration
from trainer.heartbeat import FINAL, Beat, behind

_LATE_S = 10.0
"""A rank behind the others counts as late after this long without progress: heartbeats are not simultaneous."""
_ROWS = 16
_NAMED = 4
_BAD = ("stalled", "failed", "lost")


@dataclass(frozen=True)
class Report:
    """State of a run.

    Attributes:
        run: its folder.
        state: starting, running, evaluating, saving, ended, stopped, stalled, lost or failed.
        steps: optimiser steps of the whole run.
        beats: newest heartbeat of every rank, in rank order.
        heard_s: by rank, seconds since its heartbeat was last seen to change.
        silent: ranks whose heartbeats have stopped.
        figures: newest figures.
        left_s: seconds to the last step; None if not known or over.
        checkpoint: name and age in seconds of the newest one.
    """

    run: str
    state: str
    steps: int
    beats: list[Beat]
    heard_s: dict[int, float]
    silent: set[int]
    figures: Figures
    left_s: float | None
    checkpoint: tuple[str, float] | None

    @property
    def step(self) -> int:
        """Steps that every rank has done."""
        return min((beat.step for beat in self.beats), default=0)

    @property
    def late(self) -> list[Beat]:
        """Ranks that the others wait for."""
        lagging = [b for b in behind(self.beats) if b.rank in self.silent or b.still_s > _LATE_S]
        return lagging + [b for b in self.beats if b.rank in self.silent and b not in lagging]


def line(report: Report) -> str:
    """One line, with the watcher's time of day."""
    return "  ".join([time.strftime("%F %T"), _headline(report), *_facts(report), *_troubles(report)])


def page(report: Report) -> str:
    """Several lines, and a table of the ranks; of a large run only of those that are late."""
    lines = [f"{report.run}: {_headline(report)}"]
    lines += [f"  {text}" for text in ("   ".join(_facts(report)), *_troubles(report)) if text]
    shown = report.beats if len(report.beats) <= _ROWS else report.late[:_ROWS]
    alive = any(beat.phase not in FINAL for beat in shown)
    if shown:
        header = f"  {'rank':>5}  {'host':<20} {'step':>10}  {'phase':<22}"
        lines.append(f"{header} {'no progress':>11} {'heard of':>11}" if alive else header.rstrip())
    for beat in shown:
        phase = f"{beat.phase} (while {beat.before})" if beat.phase in _BAD else beat.phase
        over = beat.phase in FINAL
        still, heard = ("", "") if over else (duration(beat.still_s), f"{duration(report.heard_s[beat.rank])} ago")
        row = f"  {beat.rank:>5}  {beat.host[:20]:<20} {beat.step:>10,}  {phase:<22} {still:>11} {heard:>11}"
        lines.append(row.rstrip())
    if len(shown) < len(report.beats):
        lines.append(f"  {len(report.beats) - len(shown):,} more of {len(report.beats):,} ranks are not late")
    return "\n".join(lines)


def _headline(report: Report) -> str:
    text = f"{report.state}, step {report.step:,} "
    if report.step > report.steps:  # the last start was to end before the checkpoint that it found
        text += f"(the config's last step is {report.steps:,})"
    else:
        text += f"of {report.steps:,} ({report.step / report.steps:.0%})"
    return text if report.left_s is None else f"{text}, {duration(report.left_s)} to go"


def _facts(report: Report) -> list[str]:
    figures, training = report.figures, report.figures.training
    facts = []
    if training.get("train/loss") is not None:
        facts.append(f"loss {training['train/loss']:.4f}")
    facts += [f"validation {name} {loss:.4f}" for name, loss in figures.validation.items()]
    if "density/mean" in training:
        facts.append(f"density {training['density/mean']:.3f} (target {training['budget/target']:.3f})")
    if training:
        facts.append(f"{training['speed/tokens_per_s']:,.0f} tokens/s")
    if training.get("speed/imbalance", 1) > 1:
        facts.append(f"busiest rank {training['speed/imbalance']:.3f} times the mean")
    if report.checkpoint is not None:
        facts.append(f"checkpoint {report.checkpoint[0]}, {duration(report.checkpoint[1])} old")
    return facts


def _troubles(report: Report) -> list[str]:
    """Which ranks are late, silent or gone, as far as the heartbeats show."""
    troubles = []
    if not report.beats:
        troubles.append(
            "no heartbeat yet: it is starting, or died before its first step; see its terminal or job output"
        )
    late = [beat for beat in report.late if beat.rank not in report.silent]
    if late:
        troubles.append(f"late: {_names(late)}")
    silent = [beat for beat in report.beats if beat.rank in report.silent]
    if silent:
        troubles.append(f"silent, so killed, frozen or cut off: {_names(silent)}")
    speechless = [beat for beat in report.beats if beat.phase not in FINAL and beat not in silent]
    if report.state in FINAL and speechless:
        troubles.append(f"others have ended, but these without reporting it: {_names(speechless)}")
    if report.state in _BAD and report.beats:
        troubles.append(f"why: {report.run}/logs/rank-N.log")
    return troubles


def _names(beats: list[Beat]) -> str:
    """The first few of ``beats``, each with where it was seen last."""
    names = [f"rank {b.rank} on {b.host} (step {b.step:,}, {b.doing} for {duration(b.still_s)})" for b in beats]
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
