"""Draw the curves of one or more runs from their metrics.

    python -m bench.curves docs/real_run.png runs/books-z2 runs/books-z3

Left: training loss (thin) and greedy validation loss (marked). Right: greedy density of every routed site, with its
mean and target. Line styles, not colours, tell runs apart, so that a black-and-white print stays readable.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from settings import command_parser, path_argument, user_errors
from trainer.monitor import metrics_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = list[dict[str, Any]]


def read_metrics(run: Path) -> Lines:
    """The lines of a run's ``metrics.jsonl``.

    Raises:
        ValueError: if the folder is not a run.
    """
    path = run / metrics_file.NAME
    if not path.is_file():
        raise ValueError(
            f"{run} is not a run folder: it has no metrics.jsonl; give the folder that train.run_dir names"
        )
    return metrics_file.read(path)


def series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: list[Path]) -> Figure:
    """Both panels for ``runs``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    losses, densities = figure.subplots(1, 2)
    for run, style, marker in zip(runs, cycle(("-", "--", ":", "-.")), cycle("os^v"), strict=False):
        lines = read_metrics(run)
        losses.plot(*series(lines, "train/loss"), style, color="0.6", linewidth=1)
        for name in _validation_sets(lines):
            label = f"{run.name}, validation {name}"
            losses.plot(*series(lines, f"validation/{name}/loss"), style, color="black", marker=marker, label=label)
            _draw_densities(densities, lines, f"validation/{name}/density", style, run.name)
    losses.set(
        xlabel="optimiser step", ylabel="nats per token", title="Loss: training (grey), greedy validation (black)"
    )
    losses.legend()
    densities.set(xlabel="optimiser step", ylabel="share of tokens executed", ylim=(0, 1))
    densities.set_title("Greedy density: sites (grey), mean (black), target (dotted)")
    if densities.has_data():
        densities.legend()
    return figure


def _draw_densities(axes: Axes, lines: Lines, name: str, style: str, label: str) -> None:
    sites = sorted({key for line in lines for key in line if key.startswith(f"{name}/")})
    for site in sites:
        axes.plot(*series(lines, site), style, color="0.7", linewidth=1)
    if sites:
        axes.plot(*series(lines, name), style, color="black", label=label)
        axes.plot(*series(lines, "budget/target"), ":", color="black", linewidth=1)


def _validation_sets(lines: Lines) -> list[str]:
    return sorted({key.split("/")[1] for line in lines for key in line if key.startswith("validation/")})


def main() -> int:
    """Write the picture."""
    parser = command_parser("bench.curves", __doc__.splitlines()[0])
    parser.add_argument("out", type=path_argument, help="picture to write (.png, .svg, .pdf)")
    parser.add_argument("runs", type=path_argument, nargs="+", help="run folders")
    arguments = parser.parse_args()
    with user_errors():
        draw(arguments.runs).savefig(arguments.out, dpi=110)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
