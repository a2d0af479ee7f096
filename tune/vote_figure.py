"""The picture of an evaluation: how the router weighs the late layers, and each candidate's results.

Dimension letters: G token classes, k late layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tune.evaluate import ENSEMBLE, ORACLE, Candidate, ExamplesEvaluation, VoteStatistics

_ROW, _COLUMN = 0.36, 0.62  # inches
_ORACLE_IS = (
    "oracle: on each token the late layer with the least loss, on each example any that is right; what a perfect vote "
    "would reach, not a model"
)


def vote_figure(evaluation: ExamplesEvaluation) -> Figure:
    """Draw mean weights by token class (only with an ensemble), and every candidate's loss and accuracy.

    Readable in black and white.
    """
    votes, candidates = evaluation.votes, evaluation.candidates
    rows = max(len(candidates), 0 if votes is None else len(votes.classes))
    height = 1.9 + _ROW * max(rows, 3)
    title = f"{evaluation.name}\n{evaluation.examples:,} examples, {evaluation.tokens:,} tokens in the right responses"
    if votes is None:
        figure = Figure(figsize=(8, height), layout="constrained")
        loss, accuracy = figure.subplots(1, 2, sharey=True)
    else:
        weights_width = 2.4 + _COLUMN * max(len(votes.layers), 3)
        figure = Figure(figsize=(weights_width + 7.5, height), layout="constrained")
        weights, loss, accuracy = figure.subplots(1, 3, width_ratios=(weights_width, 3.75, 3.75))
        loss.sharey(accuracy)
        _draw_weights(weights, votes)
        figure.supxlabel(_ORACLE_IS, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _draw_loss(loss, candidates)
    _draw_accuracy(accuracy, candidates, evaluation)
    return figure


def _draw_weights(axes: Any, votes: VoteStatistics) -> None:
    """A heat map with numbers, one row per class and one column per layer."""
    weight = votes.weight.numpy()
    axes.imshow(weight, aspect="auto", vmin=0, vmax=1, cmap="binary")
    for (row, column), value in np.ndenumerate(weight):
        color = "white" if value > 0.55 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    counts = votes.tokens.tolist()
    labels = [f"{name} ({count:,})" for name, count in zip(votes.classes, counts, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    numbers = [name.removeprefix("layer-") for name in votes.layers]
    axes.set_xticks(range(len(numbers)), numbers, fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.axhline(len(labels) - 1.5, color="black", linewidth=1)
    axes.set_title("Mean weight by class of predicted token (count)", fontsize=10)


def _draw_loss(axes: Any, candidates: list[Candidate]) -> None:
    for row, candidate in enumerate(candidates):
        axes.plot([candidate.loss], [row], **_marker(candidate.name))
        _label(axes, candidate.loss, row, f"{candidate.loss:.4f}")
    axes.set_yticks(range(len(candidates)), [candidate.name for candidate in candidates])
    axes.set_ylim(len(candidates) - 0.4, -0.75)  # downwards, with room for the labels above the dots
    axes.margins(x=0.2)
    axes.locator_params(axis="x", nbins=4)
    _finish(axes, "Loss", "nats per token")


def _draw_accuracy(axes: Any, candidates: list[Candidate], evaluation: ExamplesEvaluation) -> None:
    for row, candidate in enumerate(candidates):
        share, error = 100 * candidate.accuracy.share, 100 * candidate.accuracy.error
        axes.errorbar([share], [row], xerr=[error], ecolor="0.4", capsize=3, **_marker(candidate.name))
        _label(axes, share, row, f"{share:.1f}")
    left, right = axes.get_xlim()
    room = max(0.15 * (right - left), 4)  # for labels, and so that equal candidates do not get an empty axis
    left, right = max(left - room, -10), min(right + room, 110)
    axes.set_xlim(left, right)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(left, right)
    axes.set_xticks([tick for tick in ticks if max(left, 0) <= tick <= min(right, 100)])
    axes.tick_params(labelleft=False)
    title = f"Right among {evaluation.offered} choices" if evaluation.choices > 1 else "Exact match"
    _finish(axes, title, "% of examples, ± standard error")


def _finish(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)


def _marker(name: str) -> dict[str, Any]:
    """A layer is a black dot, the ensemble a diamond, the oracle, which is no model, a hollow dot."""
    face = "white" if name == ORACLE else "black"
    shape = "D" if name == ENSEMBLE else "o"
    return {"marker": shape, "linestyle": "none", "color": "black", "markersize": 7, "markerfacecolor": face}


def _label(axes: Any, x: float, row: int, text: str) -> None:
    axes.annotate(text, (x, row), (0, 8), textcoords="offset points", ha="center", fontsize=8)
