"""The pictures of a suite: losses and accuracies over their cost, densities by site, compute dials.

Line styles and markers, not colours, tell variants apart, so that a black-and-white print stays readable. Learned
routers are black, dense models dark grey, other routers light grey, the reference thick.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.isoflop.results import Curve, FinishedRun
from bench.isoflop.suite import Suite

FEW = 4
"""Up to this many variants have their names beside their lines."""
_WORST = 1.15
"""Early losses above this multiple of the variant's last one are left out, so that the end stays readable."""
_WORST_OF_DIAL = 1.05
"""Upper limit of the dial picture, as a multiple of the largest loss of a model as trained."""
_LINES, _MARKERS = ("--", "-.", ":", "-"), "o^vD*XP<>"
_AXES: list[tuple[str, Callable[[Curve], list[float]]]] = [
    ("executed training FLOPs", lambda curve: curve.flops),
    ("training time on this machine, minutes", lambda curve: [s / 60 for s in curve.seconds]),
    ("training tokens, millions", lambda curve: [t / 1e6 for t in curve.tokens]),
]


def loss_figure(suite: Suite, results: Sequence[FinishedRun]) -> Figure | None:
    """Validation loss over FLOPs, time and tokens; mean over seeds, bars from the lowest to the highest."""
    if not any(len(r.curve.losses) > 1 for r in results):
        return None
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    ends: list[tuple[float, float, str]] = []
    for variant, own in _by_variant(suite, results):
        for axes, (_, spent) in zip(panels, _AXES, strict=True):
            end = _curve(axes, own, spent, _style(suite, own[0]), suite.title(variant))
            if end is not None:
                ends.append(end)
    for axes, (label, _) in zip(panels, _AXES, strict=True):
        axes.set_xlabel(label)
        axes.grid(color="0.92", linewidth=0.6)
    name = next(iter(results[0].losses))
    panels[0].set_ylabel(f"validation loss on {name}, nats per token")
    shown = len(ends) // len(panels)
    if shown <= FEW:
        _name_lines(panels[-1], ends[len(panels) - 1 :: len(panels)])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(shown, 3), frameon=False
    )
    seeds = len({r.run.seed for r in results})
    over = f"; mean over up to {seeds} seeds, bars from lowest to highest" if seeds > 1 else "; one seed"
    figure.suptitle(f"Greedy routing{over}", fontsize=11)
    return figure


def density_figure(suite: Suite, results: Sequence[FinishedRun]) -> Figure | None:
    """Greedy density of every routed site of the variants whose routers learn, after the last step."""
    learned = [r for r in results if _learns(r)]
    if not learned:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for variant, own in _by_variant(suite, learned):
        style, densities = _style(suite, own[0]), [list(r.sites.values()) for r in own]
        _line(axes, list(range(len(densities[0]))), densities, style, suite.title(variant))
        router = own[0].run.config.model.router
        assert router is not None
        axes.axhline(router.density, linestyle=":", linewidth=1, color=style["color"])
    axes.set(xlabel="routed site, first layer first", ylabel="share of tokens executed", ylim=(0, 1))
    axes.set_title("Greedy density by site after the last step; targets dotted", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.92", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def task_figure(suite: Suite, results: Sequence[FinishedRun]) -> Figure | None:
    """Accuracies over FLOPs, one panel per task; mean over seeds, bars from the lowest to the highest."""
    tasks = sorted({task for r in results for task, (_, values) in r.curve.tasks.items() if len(values) > 1})
    if not tasks:
        return None
    figure = Figure(figsize=(5 * min(len(tasks), 3), 4.5 * -(-len(tasks) // 3) + 1), layout="constrained")
    panels = figure.subplots(-(-len(tasks) // 3), min(len(tasks), 3), squeeze=False).flatten()
    for axes, task in zip(panels, tasks, strict=False):
        for variant, own in _by_variant(suite, [r for r in results if task in r.curve.tasks]):
            found = [r.curve.tasks[task] for r in own]
            count = min(len(values) for _, values in found)
            x = [statistics.mean(at) for at in zip(*(flops[-count:] for flops, _ in found), strict=True)]
            _line(axes, x, [values[-count:] for _, values in found], _style(suite, own[0]), suite.title(variant))
        axes.set(xlabel="executed training FLOPs", title=task)
        axes.grid(color="0.92", linewidth=0.6)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("share of right answers")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def dial_figure(suite: Suite, results: Sequence[FinishedRun]) -> Figure | None:
    """Loss over executed FLOPs a token: the compute dials of learned routers, and dense variants at their own FLOPs.

    Each variant is shown by its first finished seed with a dial or, if dense, its first finished seed.
    """
    dials = {r.variant: r for r in reversed(results) if r.dial is not None}
    if not dials:
        return None
    ended = [r for r in results if r.curve.steps[-1:] == [r.run.config.train.steps]]  # the last loss was finite
    dense = {r.variant: r for r in reversed(ended) if r.run.config.model.router is None}
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    as_trained = []
    for variant in suite.variants:
        if variant in dials:
            style = _style(suite, dials[variant])
            points = dials[variant].dial["points"]  # type: ignore[index]
            flops, losses = [p["flops_per_token"] / 1e6 for p in points], [p["loss"] for p in points]
            axes.plot(flops, losses, **style, label=suite.title(variant))
            trained = next(place for place, point in enumerate(points) if point["trained"])
            axes.plot(flops[trained], losses[trained], "o", markersize=13, color=style["color"], fillstyle="none")
            as_trained.append(losses[trained])
        elif variant in dense:
            loss = dense[variant].curve.losses[-1]
            alone = {**_style(suite, dense[variant]), "linestyle": "none", "markersize": 9, "markerfacecolor": "white"}
            axes.plot([dense[variant].forward_flops / 1e6], [loss], **alone, label=suite.title(variant))
            as_trained.append(loss)
    first = next(iter(dials.values())).dial
    assert first is not None
    axes.set(xlabel="executed forward MFLOPs per token", ylabel="loss, nats per token")
    axes.set_title(
        f"Compute dials on {first['held_out_windows']} held-out windows of {first['validation_set']}; circled: as "
        "trained.\nDense variants (white) on the windows that training evaluates on. One seed each.",
        fontsize=10,
    )
    axes.set_ylim(top=min(axes.get_ylim()[1], _WORST_OF_DIAL * max(as_trained)))
    axes.grid(color="0.92", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _curve(
    axes: Axes, own: Sequence[FinishedRun], spent: Callable[[Curve], list[float]], style: dict[str, Any], title: str
) -> tuple[float, float, str] | None:
    """Draw one variant's losses; returns where the line ends, and its name; None if there is nothing to draw."""
    common = sorted(set.intersection(*(set(r.curve.steps) for r in own)))  # steps with a finite loss for all seeds
    if not common:
        return None

    def of_seeds(values: Callable[[Curve], list[float]]) -> list[list[float]]:
        return [[values(r.curve)[r.curve.steps.index(step)] for step in common] for r in own]

    losses, evaluations = of_seeds(lambda curve: curve.losses), len(common)
    x = [statistics.mean(at) for at in zip(*of_seeds(spent), strict=True)]
    highest = _WORST * statistics.mean(one[-1] for one in losses)
    late = [place for place in range(evaluations) if statistics.mean(one[place] for one in losses) <= highest]
    first = min(late[0], max(evaluations - 2, 0))
    ends = _line(axes, x[first:], [one[first:] for one in losses], style, title)
    return (x[-1], ends, title)


def _line(axes: Axes, x: Sequence[float], of_seeds: list[list[float]], style: dict[str, Any], title: str) -> float:
    """Draw the mean over seeds with bars from the lowest to the highest; returns the last mean."""
    places = list(zip(*of_seeds, strict=True))
    means = [statistics.mean(at) for at in places]
    axes.plot(x, means, **style, label=title)
    axes.vlines(x, [min(at) for at in places], [max(at) for at in places], colors=style["color"], linewidth=1)
    return means[-1]


def _name_lines(axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Label the lines right of the panel, spaced apart however close the lines end."""
    low, high = axes.get_ylim()
    right, least, apart = axes.get_xlim()[1], low, 0.05 * (high - low)
    for x, y, title in sorted(ends, key=lambda end: end[1]):
        least = max(y, least)
        axes.annotate(
            title, (x, y), (right + 0.03 * right, least), va="center", fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6},
        )  # fmt: skip
        least += apart


def _by_variant(suite: Suite, results: Sequence[FinishedRun]) -> list[tuple[str, list[FinishedRun]]]:
    """The variants that have finished runs, in the suite's order."""
    found = [(variant, [r for r in results if r.variant == variant]) for variant in suite.variants]
    return [(variant, own) for variant, own in found if own]


def _learns(result: FinishedRun) -> bool:
    router = result.run.config.model.router
    return router is not None and router.learned


def _style(suite: Suite, result: FinishedRun) -> dict[str, Any]:
    """Line style of a variant, given one of its results; the same in every picture."""
    variant, router = result.variant, result.run.config.model.router
    if variant == suite.reference:
        return {"color": "0", "linestyle": "-", "marker": "s", "linewidth": 2.4, "markersize": 6}
    place = [name for name in suite.variants if name != suite.reference].index(variant)
    color = "0.4" if router is None else "0" if router.learned else "0.6"
    return {
        "color": color,
        "linestyle": _LINES[place % len(_LINES)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linewidth": 1.3,
        "markersize": 6,
        "markerfacecolor": "white" if place % 2 else color,
    }


PICTURES = {
    "loss.png": loss_figure,
    "density.png": density_figure,
    "tasks.png": task_figure,
    "dial.png": dial_figure,
}
"""A suite's pictures by file name."""
