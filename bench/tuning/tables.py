"""Tables that compare tuning methods: the accuracy of each, and differences between two, example by example."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.common.paired import by_examples
from bench.common.timing import ratios
from bench.tuning.runs import COMPARED, Runs, outcome
from settings.tables import markdown

PAIRED = (
    "Intervals come from a bootstrap over both examples and seeds (bench/common/paired.py), with the number of seeds "
    "after them; an interval that contains 0 shows no difference."
)


def reached(options: argparse.Namespace, runs: Runs, times: dict[str, list[float]]) -> str:
    """Markdown: one row per method."""
    header = ["method", "trained", "share", f"step / {options.methods[0]}"]
    for task in options.tasks:
        header += [f"{task}: rate"] if options.rates else []
        header += [f"{task}: final layer, %", "vote, %", "best layer, %", "oracle, %"]
    rows = [header]
    for method in options.methods:
        cells, trained = [], ["", ""]
        for task in options.tasks:
            own = list(dict.fromkeys(runs[method, task, seed] for seed in options.seeds))
            found = [outcome(run.folder(options.out), task, options.per_token) for run in own]
            done = [one for one in found if one is not None]
            cells += ["-" if own[0].rate is None else f"{own[0].rate:g}"] if options.rates else []
            cells += [
                _spread(getattr(one, field) for one in done) for field in ("final", "voted", "best_layer", "oracle")
            ]
            if done:
                trained = [f"{done[0].trained:,}", f"{done[0].trained / done[0].total:.2%}"]
        ratio = f"{ratios(times[method], times[options.methods[0]]).median:.2f}" if times else ""
        rows.append([method, *trained, ratio, *cells])
    return markdown(rows)


def paired(options: argparse.Namespace, runs: Runs) -> str:
    """Markdown: each method's vote against others' on the same examples and seeds, and against its own final layer."""
    rows = [["method", "minus", *(f"{task}, points (95 %; seeds)" for task in options.tasks)]]
    for method in options.methods:
        for other in dict.fromkeys((options.methods[0], COMPARED.get(method, method))):
            if other in options.methods and other != method:
                rows.append([method, other, *_differences(options, runs, method, other)])
        if "ensemble" in method:
            rows.append([method, "its final layer", *_differences(options, runs, method, method)])
    return markdown(rows)


def _differences(options: argparse.Namespace, runs: Runs, method: str, other: str) -> list[str]:
    """One cell per task: the vote of ``method`` minus that of ``other``, or minus its own final layer."""
    cells = []
    for task in options.tasks:
        differences = []
        for seed in options.seeds:
            folders = [runs[name, task, seed].folder(options.out) for name in (method, other)]
            ours, theirs = (_right(folder, task, options.per_token) for folder in folders)
            if ours and theirs:
                beside = theirs.final if method == other else theirs.voted
                differences.append([x - y for x, y in zip(ours.voted, beside, strict=True)])
        cells.append(_difference(differences))
    return cells


class _Right(NamedTuple):
    """Which test examples a run gets right, 1 or 0 each: by vote (without one, by final layer), and by final layer."""

    voted: list[int]
    final: list[int]


def _right(folder: Path, task: str, per_token: bool) -> _Right | None:
    """Read from a run's file of answers; None if it is not done."""
    from tune.evaluate import ENSEMBLE
    from tune.report import PER_TOKEN
    from tune.tuner import ANSWERS

    path = folder / ANSWERS.format(task)
    if not path.is_file():
        return None
    found: dict[str, list[int]] = json.loads(path.read_text(encoding="utf-8"))
    ending = PER_TOKEN if per_token else ""
    final = max(name for name in found if name.startswith("layer-") and not name.endswith(PER_TOKEN)) + ending
    return _Right(found.get(ENSEMBLE + ending, found[final]), found[final])


def _difference(differences: Sequence[Sequence[float]]) -> str:
    """Mean and interval of differences by seed and example, in points."""
    if not differences:
        return "-"
    mean, low, high = (100 * value for value in by_examples(differences))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f}; {len(differences)})"


def _spread(shares: Iterable[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    values = [100 * share for share in shares]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"
