"""The tables of a suite: ``results.md`` for people, ``results.csv`` with one row per run; and a comparison of two CSVs.

docs/isoflop.md explains each column.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.common.paired import by_signs
from bench.isoflop.results import FinishedRun
from bench.isoflop.suite import Suite
from settings.tables import markdown

CSV, MARKDOWN = "results.csv", "results.md"
TIME = "time/"
"""Prefix of the columns that depend on the machine and its other load."""
TOLERANCE = 1e-5
"""Relative difference up to which two figures count as the same."""
_NONE = "-"


def rows(suite: Suite, results: Sequence[FinishedRun]) -> list[dict[str, str]]:
    """One row per finished run, all with the same columns; figures in full precision, empty where there is none."""
    reference = [r.flops for r in results if r.variant == suite.reference]
    table = []
    for result in results:
        router, (total, without_embedding) = result.run.config.model.router, result.parameters
        figures: dict[str, float | None] = {
            "seed": result.run.seed,
            "layers": result.run.config.model.layers,
            "parameters": total,
            "parameters_without_embedding": without_embedding,
            "steps": result.run.config.train.steps,
            "tokens": result.tokens,
            "flops": result.flops,
            "flops_planned": result.run.planned_flops,
            "flops_of_reference": result.flops / statistics.mean(reference) if reference else None,
            "density_target": None if router is None else router.density,
            "density": result.density,
            **{f"loss/{name}": loss for name, loss in result.losses.items()},
            **{f"downstream/{task}": result.downstream.get(task) for task in _tasks(suite)},
            f"{TIME}tokens_per_s": result.tokens_per_s,
            f"{TIME}training_s": result.seconds,
        }
        exact = {name: "" if value is None else repr(value) for name, value in figures.items()}
        table.append({"variant": result.variant, **exact})
    return table


def as_csv(table: Sequence[dict[str, str]]) -> str:
    """The rows as CSV text; just the name of the first column if there are none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else ["variant"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def main_table(suite: Suite, results: Sequence[FinishedRun]) -> str:
    """Markdown: one row per variant, in the suite's order; mean ± standard deviation over seeds (their number)."""
    sets = list(results[0].losses) if results else []
    header = ["variant", "layers", "parameters without embedding", "density: target", "greedy", "training tokens"]
    header += [f"executed FLOPs of {suite.title(suite.reference)}"]
    for name in sets:
        header += [f"validation loss, {name}", f"minus {suite.title(suite.reference)}, by seed", "from 0"]
    header += [f"{task}, {'bits per byte' if task == 'perplexity' else 'accuracy'}" for task in _tasks(suite)]
    reference = _of(results, suite.reference)
    body = []
    for variant in suite.variants:
        own = _of(results, variant)
        if not own:
            body.append([suite.title(variant), *[_NONE] * (len(header) - 1)])
            continue
        config, (_, parameters) = own[0].run.config, own[0].parameters
        target = config.model.router
        row = [suite.title(variant), str(config.model.layers), f"{parameters:,}"]
        row += [_NONE if target is None else f"{target.density:.3f}", spread((r.density for r in own), ".3f")]
        row += [f"{own[0].tokens:,}", _ratio(own, reference, lambda r: r.flops)]
        for name in sets:
            row.append(spread((r.losses[name] for r in own), ".4f", count=True))
            row += [_NONE, _NONE] if variant == suite.reference else _paired(own, reference, name)
        row += [spread((r.downstream.get(task) for r in own), ".4f") for task in _tasks(suite)]
        body.append(row)
    return markdown([header, *body])


def time_table(suite: Suite, results: Sequence[FinishedRun]) -> str:
    """Markdown: speed and time of every variant's runs, relative to the reference's."""
    header = ["variant", "tokens/s", "executed FLOP/s", "time of the run"]
    figures: list[Callable[[FinishedRun], float]] = [
        lambda r: r.tokens_per_s,
        lambda r: r.flops / r.seconds,
        lambda r: r.seconds,
    ]
    reference = _of(results, suite.reference)
    body = []
    for variant in suite.variants:
        own = _of(results, variant)
        body.append([suite.title(variant), *(_ratio(own, reference, figure) for figure in figures)])
    return markdown([header, *body])


def whole_report(suite: Suite, results: Sequence[FinishedRun], planned_runs: int, made_by: Sequence[str]) -> str:
    """``results.md``.

    Args:
        planned_runs: number of runs in the suite.
        made_by: lines on what produced the results.
    """
    sets = ", ".join(results[0].losses) if results else ""
    return "\n".join(
        [
            "# Equal executed FLOPs",
            "",
            f"{len(results)} of {planned_runs} runs are done. Losses are nats per token of greedy routing after the "
            f"last step ({sets}); ± is the standard deviation over seeds, their number is in brackets. docs/isoflop.md "
            "explains the columns.",
            "",
            main_table(suite, results),
            "",
            "## Time on this machine",
            "",
            f"Relative to {suite.title(suite.reference)}; steps only, evaluations and saves left out. Runs side by "
            "side, or beside other work, have slowed each other down.",
            "",
            time_table(suite, results),
            "",
            "## Made by",
            "",
            *(f"* {line}" for line in made_by),
            "",
        ]
    )


def spread(values: Iterable[float | None], form: str, count: bool = False) -> str:
    """Mean ± standard deviation, with the number of values if ``count``; one value has no deviation."""
    found = [value for value in values if value is not None]
    if not found:
        return _NONE
    deviation = f" ± {statistics.stdev(found):{form.removeprefix('+')}}" if len(found) > 1 else ""
    return f"{statistics.mean(found):{form}}{deviation}" + (f" ({len(found)})" if count else "")


def compare(table: Sequence[dict[str, str]], other: Path) -> str:
    """Compare rows with another suite's ``results.csv``, all columns but those of time; reports the largest difference.

    Raises:
        ValueError: if it is not there, or a run is missing on one side, or a figure is off by more than ``TOLERANCE``.
    """
    path = other / CSV
    if not path.is_file():
        raise ValueError(f"--against {other}: there is no {path}; give the --out folder of a suite that has its tables")
    with path.open(encoding="utf-8", newline="") as file:
        theirs = {(row["variant"], row.get("seed", "")): row for row in csv.DictReader(file)}
    ours = {(row["variant"], row["seed"]): row for row in table}
    for variant, seed in [*(ours.keys() - theirs.keys()), *(theirs.keys() - ours.keys())]:
        where = f"only in {path}" if (variant, seed) in theirs else f"not in {path}"
        raise ValueError(f"{variant} with seed {seed} is {where}; compare suites of the same runs")
    largest, place, compared = 0.0, "", 0
    for (variant, seed), row in ours.items():
        for column in sorted(row.keys() | theirs[variant, seed].keys()):
            if column == "variant" or column.startswith(TIME):
                continue
            difference = _difference(row.get(column), theirs[variant, seed].get(column))
            compared += 1
            if difference > largest:
                largest, place = difference, f"{column} of {variant} with seed {seed}"
    if largest > TOLERANCE:
        raise ValueError(
            f"{place} differs from {path} by {largest:.1e} relative, more than the allowed {TOLERANCE:g}; look for a "
            "different config, version, number of threads or ranks, or machine"
        )
    outcome = f"the largest relative difference is {largest:.1e} ({place})" if place else "they are the same"
    return f"{compared} figures of {len(ours)} runs agree with {path}: {outcome}"


def _difference(one: str | None, other: str | None) -> float:
    """Relative difference of two cells; infinite if they differ and either is no number."""
    if one == other:
        return 0.0
    try:
        a, b = float(one or ""), float(other or "")
    except ValueError:
        return float("inf")
    return abs(a - b) / max(abs(a), abs(b))


def _tasks(suite: Suite) -> list[str]:
    return suite.downstream.tasks if suite.downstream else []


def _of(results: Sequence[FinishedRun], variant: str) -> list[FinishedRun]:
    return [result for result in results if result.variant == variant]


def _ratio(own: Sequence[FinishedRun], reference: Sequence[FinishedRun], figure: Callable[[FinishedRun], float]) -> str:
    """Mean over seeds, relative to the reference's mean."""
    if not own or not reference:
        return _NONE
    return f"{statistics.mean(map(figure, own)) / statistics.mean(map(figure, reference)):.3f}"


def _paired(own: Sequence[FinishedRun], reference: Sequence[FinishedRun], name: str) -> list[str]:
    """Loss minus that of the reference's run with the same seed, and how far from 0 that is."""
    of_seed = {r.run.seed: r.losses[name] for r in reference}
    pairs = [(r.losses[name], of_seed.get(r.run.seed)) for r in own]
    leads = [a - b for a, b in pairs if a is not None and b is not None]
    return [spread(leads, "+.4f", count=True), by_signs(leads).sentence() if len(leads) > 1 else _NONE]
