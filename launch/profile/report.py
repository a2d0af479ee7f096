"""The one page that ``launch.profile`` prints."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launch.profile.trace import ELSEWHERE, Place, Sums
from settings import counted, tables
from trainer.monitor.phase_names import PARTS, PHASES

_STEP = PHASES["training"]
_MB = 1e6
_OPERATORS = 10
_SLOW = 1.2
"""Layers that take more than this multiple of the median are named."""
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Row:
    """A row of a table, per step.

    Attributes:
        name: of the phase or site.
        cpu_ms: self time of operators.
        gpu_ms: of the kernels that they launched.
        allocated_mb: allocated.
        held_mb: alive at the peak.
    """

    name: str
    cpu_ms: float
    gpu_ms: float
    allocated_mb: float
    held_mb: float


def by_phase(sums: Sums) -> list[Row]:
    """Phases in order, the step split into its parts."""
    names = [PHASES["loading"], *PARTS, "rest of the step", PHASES["saving"], PHASES["evaluating"]]
    rows = _rows(sums, lambda p: p.phase if p.phase != _STEP else p.part or "rest of the step")
    return sorted(rows, key=lambda row: names.index(row.name) if row.name in names else len(names))


def by_site(sums: Sums, each_layer: bool = False) -> list[Row]:
    """Sites of forward and backward passes, layers together or each on its own; the longest first."""

    def name(place: Place) -> str:
        if place.phase != _STEP or place.part not in ("forward", "backward"):
            return ""
        if each_layer or not place.site.startswith("layer-"):
            return place.site or ELSEWHERE
        kind = place.site.partition(" ")[2]
        return f"layers: {kind}" if kind else "layers: norms, gather, add"

    rows = [row for row in _rows(sums, name) if row.name]
    return sorted(rows, key=lambda row: -(row.gpu_ms or row.cpu_ms))


def page(sums: Sums, title: str, each_layer: bool = False) -> str:
    """Everything: phases, waiting, sites, operators."""
    steps = sums.steps
    head = f"{title}: {counted(steps, 'step')} of {sums.in_steps / steps / 1e3:,.1f} ms" + (
        f", the GPU busy for {sums.busy / sums.wall:.0%} of the time" if sums.kernels else ""
    )
    parts = [head, _table("phase", by_phase(sums), sums), _waiting(sums)]
    parts += [_table("site, forward and backward", by_site(sums, each_layer), sums), _layers(sums), _operators(sums)]
    return "\n\n".join(part for part in parts if part)


def _rows(sums: Sums, name: Callable[[Place], str]) -> list[Row]:
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    per_step = 1e3 * sums.steps
    columns: list[tuple[Mapping[Place, float], float]] = [
        (sums.by_place, per_step),
        (sums.kernels, per_step),
        (sums.allocated, _MB * sums.steps),
        (sums.held, _MB),
    ]
    for column, (values, unit) in enumerate(columns):
        for place, value in values.items():
            if place.phase:
                found[name(place)][column] += value / unit
    return [Row(label, *figures) for label, figures in found.items()]


def _table(label: str, rows: list[Row], sums: Sums) -> str:
    gpu = bool(sums.kernels)
    total = sum(row.gpu_ms if gpu else row.cpu_ms for row in rows) or 1.0
    table = [[label, "CPU ms", *(["GPU ms"] if gpu else []), "share", "allocated MB", "held at peak MB"]]
    for row in rows:
        share = (row.gpu_ms if gpu else row.cpu_ms) / total
        times = [f"{row.cpu_ms:,.2f}", *([f"{row.gpu_ms:,.2f}"] if gpu else [])]
        table.append([row.name, *times, f"{share:.1%}", f"{row.allocated_mb:,.1f}", f"{row.held_mb:,.1f}"])
    return tables.columns(table)


def _waiting(sums: Sums) -> str:
    data = sum(time for place, time in sums.by_place.items() if place.phase == PHASES["loading"])
    parts = {"data": data, **sums.waiting, "Python between operators": sums.between}
    return "waiting: " + ", ".join(f"{name} {time / sums.wall:.1%}" for name, time in parts.items() if time)


def _layers(sums: Sums) -> str:
    """Which layers take longer than others."""
    times: dict[str, float] = defaultdict(float)
    for place, time in (sums.kernels or sums.by_place).items():
        if found := re.match(r"layer-\d+", place.site):
            times[found.group()] += time if place.phase == _STEP else 0.0
    if len(times) < 3:
        return ""
    median = statistics.median(times.values())
    slow = {name: time / median for name, time in times.items() if time > _SLOW * median}
    named = ", ".join(f"{name} {ratio:.2f}" for name, ratio in sorted(slow.items(), key=lambda item: -item[1])[:8])
    beyond = f"; beyond {_SLOW:g} times that: {named}" if named else f"; none beyond {_SLOW:g} times that"
    return f"the median layer takes {median / sums.steps / 1e3:,.2f} ms of a step{beyond} (--layers has all)"


def _operators(sums: Sums) -> str:
    found, kind = (sums.by_kernel, "kernel") if sums.by_kernel else (sums.by_operator, "operator")
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:_OPERATORS]
    table = [[f"{kind}s with most time of their own", "ms a step", "share", "calls a step"]]
    for name, (time, calls) in longest:
        short = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        step_ms = time / sums.steps / 1e3
        table.append([short, f"{step_ms:,.2f}", f"{time / sums.wall:.1%}", f"{calls / sums.steps:,.4g}"])
    return tables.columns(table)
