"""Pictures of the routing: densities over training, and which layers the tokens of one text executed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

_TOKENS = 160  # as many columns as a screen can tell apart


def routing_figure(
    sites: list[str], steps: Sequence[int], densities: Sequence[Sequence[float]], executed: Tensor, target: float
) -> Figure:
    """Draw two panels.

    Args:
        sites: names of the routed sites, S of them, first layer first.
        steps: the evaluations so far, E optimiser steps.
        densities: greedy density of every site at every evaluation, [E][S].
        executed: bool [S, T], the decisions on one validation window.
        target: the budget's density.
    """
    history = np.asarray(densities).T
    shown = executed[:, :_TOKENS].numpy()
    figure = Figure(figsize=(13, 2.2 + 0.26 * len(sites)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))

    picture = left.imshow(history, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="cividis")
    left.set_title(f"Density in greedy evaluation (target {target:.2f})", fontsize=10)
    left.set_xlabel("optimiser step")
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).round().astype(int))
    left.set_xticks(ticks, [f"{steps[t]:,}" for t in ticks])
    left.set_yticks(range(len(sites)), sites, fontsize=8)
    bar = figure.colorbar(picture, ax=left, fraction=0.05)
    bar.set_label("share of tokens executed", fontsize=8)
    if len(steps) <= 8:
        for (row, column), value in np.ndenumerate(history):
            color = "white" if value < 0.5 else "black"
            left.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)

    right.imshow(shown, aspect="auto", origin="lower", cmap="binary", interpolation="nearest", vmin=0, vmax=1)
    right.set_title(
        f"Executed (black) and skipped, first {shown.shape[1]} tokens of a validation text, and their share",
        fontsize=10,
    )
    for row, share in enumerate(shown.mean(axis=1)):
        right.text(1.005, row, f"{share:.2f}", transform=right.get_yaxis_transform(), va="center", fontsize=7)
    right.set_xlabel("token")
    right.set_yticks(range(len(sites)), sites, fontsize=8)
    right.set_yticks(np.arange(len(sites) + 1) - 0.5, minor=True)
    right.grid(axis="y", which="minor", color="0.85", linewidth=0.6)
    right.tick_params(which="minor", length=0)
    return figure
