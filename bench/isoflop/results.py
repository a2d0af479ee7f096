"""Results of a suite's finished runs, read from their folders; see ``bench/isoflop``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.isoflop.runs import by_step, is_done, read_dial, read_downstream
from bench.isoflop.suite import Run, Suite
from model.flops import parameter_counts
from trainer.monitor import metrics_file

_SHARES = ("/acc", "/exact_match")


@dataclass(frozen=True)
class Curve:
    """Validation losses on the suite's first set, and the cost up to then; one entry per evaluation.

    Attributes:
        flops: executed training FLOPs.
        seconds: time spent in training steps.
        tokens: training tokens.
        losses: nats per token, greedy routing.
        steps: optimiser steps done; an evaluation with a non-finite loss has no entry.
        tasks: by ``task/metric``, the FLOPs spent and the accuracies on ``train.evaluation.tasks``.
    """

    flops: list[float]
    seconds: list[float]
    tokens: list[float]
    losses: list[float]
    steps: list[int]
    tasks: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        run: the run itself.
        tokens: training tokens.
        flops: executed training FLOPs: the sum over log intervals of tokens times the mean
            ``flops/executed_per_token``, which is forward and backward.
        seconds: time spent in training steps, without saves, evaluations and work lost to a kill.
        losses: by validation set, nats per token at the last step, greedy routing; None if it was not finite.
        density: greedy, at the last step, on the first set, mean over the sites; None for a dense model.
        sites: the same by site.
        forward_flops: executed FLOPs of a forward pass at the last step, on the first set, per token.
        downstream: one figure per task; empty if there is none.
        dial: ``dial.json``; None if there is none.
        curve: over the run.
    """

    run: Run
    tokens: int
    flops: float
    seconds: float
    losses: dict[str, float | None]
    density: float | None
    sites: dict[str, float]
    forward_flops: float
    downstream: dict[str, float]
    dial: dict[str, Any] | None
    curve: Curve

    @property
    def variant(self) -> str:
        """Its variant's name."""
        return self.run.variant

    @property
    def tokens_per_s(self) -> float:
        """Training tokens a second, saves and evaluations left out."""
        return self.tokens / self.seconds

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of all parameters, and of those without embedding and head."""
        counts = parameter_counts(self.run.config.model)
        return counts["total"], counts["total"] - counts["embedding"] - counts["head"]


def collect(suite: Suite, runs: Sequence[Run]) -> list[FinishedRun]:
    """Every finished run of ``runs``, in their order.

    Raises:
        ValueError: if a folder holds a run of another config.
    """
    return [_read(suite, run) for run in runs if is_done(run)]


def _read(suite: Suite, run: Run) -> FinishedRun:
    lines = by_step(run.folder)
    steps, spent = _spent(lines)
    last, names = lines[run.config.train.steps], [source.name for source in run.config.data.validation]
    prefix = f"validation/{names[0]}"
    evaluated = [step for step in sorted(lines) if lines[step].get(f"{prefix}/loss") is not None]
    # An evaluation may lie between two log lines.
    flops, seconds, tokens = (np.interp(evaluated, steps, spent[:, place]).tolist() for place in range(3))
    density = last.get(f"{prefix}/density")
    return FinishedRun(
        run=run,
        tokens=round(spent[-1, 2]),
        flops=float(spent[-1, 0]),
        seconds=float(spent[-1, 1]),
        losses={name: last[f"validation/{name}/loss"] for name in names},
        density=density,
        sites={site: last[f"{prefix}/density/{site}"] for site in run.config.model.sites},
        forward_flops=last[f"{prefix}/flops_per_token"],
        downstream=(read_downstream(run, suite.downstream) or {}) if suite.downstream else {},
        dial=read_dial(run),
        curve=Curve(
            flops,
            seconds,
            tokens,
            [lines[step][f"{prefix}/loss"] for step in evaluated],
            evaluated,
            _tasks(lines, steps, spent),
        ),
    )


def _tasks(
    lines: dict[int, dict[str, Any]], steps: list[int], spent: np.ndarray
) -> dict[str, tuple[list[float], list[float]]]:
    """Task accuracies in the course of training: see :class:`Curve`."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for step in sorted(lines):
        for name, value in metrics_file.under("tasks/", lines[step]).items():
            if name.endswith(_SHARES) and value is not None:
                flops, values = found.setdefault(name, ([], []))
                flops.append(float(np.interp(step, steps, spent[:, 0])))
                values.append(value)
    return found


def _spent(lines: dict[int, dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Logged steps, and the cost up to each: [steps, 3], FLOPs, seconds and tokens."""
    steps, spent = [0], [(0.0, 0.0, 0.0)]
    for step in sorted(lines):
        line = lines[step]
        if "train/tokens" not in line:
            continue
        flops, seconds, before = spent[-1]
        own = line["train/tokens"] - before
        steps.append(step)
        flops += own * line["flops/executed_per_token"]
        spent.append((flops, seconds + own / line["speed/tokens_per_s"], line["train/tokens"]))
    return steps, np.array(spent)
