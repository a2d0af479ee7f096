"""The dial's curve: loss against executed FLOPs, with each point's density beside it."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from evals.dial.file import Dial


def draw(dial: Dial, name: str) -> Figure:
    """Draw ``dial`` of the run ``name``. Readable in black and white."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense = dial.trained.dense_flops_per_token
    flops = [point.flops_per_token / 1e6 for point in dial.points]
    losses = [point.loss for point in dial.points]
    axes.plot(flops, losses, "-o", color="black", markersize=5, label="calibrated thresholds")
    trained = dial.trained
    axes.plot(
        [trained.flops_per_token / 1e6], [trained.loss], "D", color="black", markersize=11, markerfacecolor="white",
        markeredgewidth=1.5, zorder=4, label="as trained",
    )  # fmt: skip
    axes.axvline(dense / 1e6, color="0.5", linestyle=":", label="FLOPs without routers")
    for place, point in enumerate(dial.points):
        falls = losses[place] > losses[min(place + 1, len(losses) - 1)]
        # Beside a falling curve, above a rising one; the trained point's neighbours may be close, so below.
        offset, align = ((0, -22), "center") if point.trained else ((8, 5), "left") if falls else ((0, 9), "center")
        axes.annotate(
            f"{point.held_out_density:.2f}",
            (flops[place], losses[place]),
            offset,
            textcoords="offset points",
            ha=align,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.margins(x=0.07, y=0.14)
    axes.set(xlabel="executed forward MFLOPs per token", ylabel="loss, nats per token")
    axes.set_title(
        f"{name}, step {dial.step:,}: {dial.held_out_windows} held-out windows of {dial.validation_set}\n"
        "labels: share of tokens executed, mean over the sites",
        fontsize=10,
    )
    percent = 1e8 / dense  # of the dense FLOPs, per MFLOP

    def to_percent(x: Any) -> Any:
        return x * percent

    def to_mflops(share: Any) -> Any:
        return share / percent

    top = axes.secondary_xaxis("top", functions=(to_percent, to_mflops))
    top.set_xlabel("% of the FLOPs without routers", fontsize=9)
    axes.grid(color="0.9", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)  # inside, it would cover a point's label
    return figure
