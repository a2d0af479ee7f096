"""Does the lead grow with size? One suite at several sizes: a fit over parameters with its uncertainty, and a picture.

    for width in 32 48 64; do
        python -m bench.isoflop bench/suites/ladder.yaml tokens=$((width * width * 750)) set.model.width=$width \\
            set.model.heads=$((width / 32)) set.model.ffn_width=$((width * 3)) \\
            set.train.schedule.warmup_steps=$((width * width * 750 / 40960)) --out runs/ladder/$width
    done
    python -m bench.isoflop.ladder runs/ladder/*/ --at 160e6

15 tokens per parameter, a tenth of the steps as warm-up; width 128 in docs/results.md is bench/suites/small.yaml. Every
FOLDER is the --out of one size; folders of the same size are merged, and a seed found in several of them counts once. A
point is one seed: the variant's loss minus that of the suite's reference with the same seed. The line is an ordinary
least-squares fit of these points over the logarithm of the reference's parameters without the embedding; the band is
one standard error of its mean. Writes ladder.md and ladder.png to --out.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.common.options import parser
from bench.common.paired import by_signs
from bench.isoflop.report import CSV, TOLERANCE, spread
from data.files import write_atomically
from settings import path_argument, peek, positive_number, user_errors
from settings.tables import aligned_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """One seed at one size; fields as in :class:`Rung`."""

    loss: float
    lead: float
    flops: float


class Rung(NamedTuple):
    """One size.

    Attributes:
        parameters: of the reference, without embedding and head.
        tokens: of a run of the reference.
        losses: of the reference, by seed, nats per token.
        leads: loss of the variant minus that of the reference, by seed.
        flops: executed in training, relative to the reference.
    """

    parameters: int
    tokens: int
    losses: list[float]
    leads: list[float]
    flops: float


class Fit(NamedTuple):
    """lead = level + slope x (log10 of the parameters - middle).

    Attributes:
        covariance: [2, 2] of level and slope, from the scatter of the points about the line.
    """

    level: float
    slope: float
    middle: float
    covariance: np.ndarray

    def at(self, parameters: float) -> tuple[float, float]:
        """The line at ``parameters`` and the standard error of its mean."""
        x = np.array([1.0, math.log10(parameters) - self.middle])
        return float(x @ [self.level, self.slope]), float(np.sqrt(x @ self.covariance @ x))


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, fit, draw."""
    options = _parser().parse_args(arguments)
    with user_errors():
        rungs = gather(options.folders, options.variant)
        found = fit(rungs)
        table = report(rungs, found, options.at)
        options.out.mkdir(parents=True, exist_ok=True)
        picture = io.BytesIO()
        _draw(rungs, found, options.at).savefig(picture, dpi=110)
        write_atomically(options.out / "ladder.md", table.encode())
        write_atomically(options.out / "ladder.png", picture.getvalue())
        print(table)
        print(f"wrote ladder.md and ladder.png to {options.out}")
    return 0


def gather(folders: Sequence[Path], variant: str) -> list[Rung]:
    """The sizes in the suites' folders, the smallest first.

    Raises:
        ValueError: as :func:`read`; also if two folders disagree on the losses of one seed at one size.
    """
    sizes: dict[tuple[int, int], dict[str, tuple[Path, Point]]] = {}
    for folder in folders:
        size, points = read(folder, variant)
        for seed, point in points.items():
            other, known = sizes.setdefault(size, {}).setdefault(seed, (folder, point))
            if not np.allclose(known[:2], point[:2], rtol=0, atol=TOLERANCE * known.loss):
                raise ValueError(
                    f"{other} and {folder} both have seed {seed} at {size[0]:,} parameters, with losses of the "
                    f"reference {known.loss:.6f} and {point.loss:.6f} and leads {known.lead:+.6f} and "
                    f"{point.lead:+.6f}; leave one of the folders out"
                )
    rungs = []
    for (parameters, tokens), found in sorted(sizes.items()):
        losses, leads, spent = zip(*(point for _, point in found.values()), strict=True)
        rungs.append(Rung(parameters, tokens, [*losses], [*leads], statistics.fmean(spent)))
    return rungs


def read(folder: Path, variant: str) -> tuple[tuple[int, int], dict[str, Point]]:
    """Parameters and tokens of the size in a suite's folder, and its points by seed.

    Raises:
        ValueError: if it has no tables, or no seed of both the variant and the reference.
    """
    table = folder / CSV
    if not table.is_file():
        raise ValueError(f"there is no {table}; give the --out folders of bench.isoflop, which writes its tables there")
    reference = peek(folder / "suite.yaml")["reference"]
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    loss = next((name for name in rows[0] if name.startswith("loss/")), "") if rows else ""
    theirs = {row["seed"]: float(row[loss]) for row in rows if row["variant"] == reference and row[loss]}
    own = {row["seed"]: row for row in rows if row["variant"] == variant and row[loss] and row["seed"] in theirs}
    if not own or variant == reference:
        there = ", ".join(sorted({row["variant"] for row in rows} - {reference})) or "none"
        raise ValueError(
            f"{table} has no seed of both {variant} and the reference {reference}; give --variant one of its others: "
            f"{there}"
        )
    first = next(row for row in rows if row["variant"] == reference)
    points = {
        seed: Point(theirs[seed], float(row[loss]) - theirs[seed], float(row["flops_of_reference"]))
        for seed, row in own.items()
    }
    return (int(first["parameters_without_embedding"]), int(first["tokens"])), points


def fit(rungs: Sequence[Rung]) -> Fit:
    """Least squares over all seeds of all sizes.

    Raises:
        ValueError: if there are fewer than two sizes, or too few points for a standard error.
    """
    x = np.array([math.log10(rung.parameters) for rung in rungs for _ in rung.leads])
    y = np.array([lead for rung in rungs for lead in rung.leads])
    sizes = len({rung.parameters for rung in rungs})
    if sizes < 2 or len(y) < 3:
        raise ValueError(
            f"a line with an uncertainty needs two sizes and three runs of the variant, got {sizes} and {len(y)}; add "
            "folders or seeds"
        )
    design = np.stack([np.ones_like(x), x - x.mean()], axis=1)
    (level, slope), *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ [level, slope]
    variance = float(rest @ rest) / (len(y) - 2)
    return Fit(float(level), float(slope), float(x.mean()), variance * np.linalg.inv(design.T @ design))


def report(rungs: Sequence[Rung], found: Fit, at: float) -> str:
    """Markdown: one row per size, then the fitted slope and the line at ``at`` parameters."""
    rows = [["parameters without embedding", "tokens", "reference's loss", "lead", "from 0", "executed FLOPs"]]
    for rung in rungs:
        far = by_signs(rung.leads).sentence() if len(rung.leads) > 1 else "-"
        rows.append(
            [
                f"{rung.parameters:,}",
                f"{rung.tokens:,}",
                spread(rung.losses, ".4f"),
                spread(rung.leads, "+.4f", count=True),
                far,
                f"{rung.flops:.3f}",
            ]
        )
    there, error = found.at(at)
    slope_error = float(np.sqrt(found.covariance[1, 1]))
    return (
        f"{aligned_markdown(rows)}\n\nSlope: {found.slope:+.4f} ± {slope_error:.4f} nats for ten times the parameters. "
        f"The line at {at:,.0f} parameters: {there:+.4f} ± {error:.4f} nats (± is one standard error of the line; it "
        "does not say that the line is straight that far).\n"
    )


def _draw(rungs: Sequence[Rung], found: Fit, at: float) -> Figure:
    """Points by seed, the line and its band, up to ``at``."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    smallest, largest = (choose(rung.parameters for rung in rungs) for choose in (min, max))
    sizes = np.geomspace(smallest, max(at, largest), 100)
    line, error = np.array([found.at(size) for size in sizes]).T
    measured = sizes <= largest
    axes.fill_between(sizes, line - error, line + error, color="0.88", label="one standard error of the line")
    axes.plot(sizes[measured], line[measured], color="black", label="fit")
    axes.plot(sizes[~measured], line[~measured], color="black", linestyle=":", label="extrapolation")
    for rung in rungs:
        axes.plot([rung.parameters] * len(rung.leads), rung.leads, "o", color="black", markerfacecolor="white")
        axes.annotate(
            f"{rung.tokens / 1e6:.3g} M tokens",
            (rung.parameters, 0.02),
            xycoords=axes.get_xaxis_transform(),
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xscale("log")
    axes.set(
        xlabel="parameters of the reference without embedding", ylabel="loss minus the reference's, nats per token"
    )
    axes.set_title("Lead at equal executed training FLOPs, one point per seed; below 0 is better", fontsize=10)
    axes.grid(color="0.92", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _parser() -> argparse.ArgumentParser:
    made = parser("bench.isoflop.ladder", str(__doc__))
    made.add_argument("folders", nargs="+", type=path_argument, metavar="FOLDER", help="--out of bench.isoflop, a size")
    made.add_argument("--variant", default="skip-8", help="compared with the reference (default: %(default)s)")
    made.add_argument(
        "--at",
        type=positive_number(1e15),
        default=160e6,
        help="number of parameters at which to evaluate the line (default: %(default)g)",
    )
    made.add_argument(
        "--out", type=path_argument, default=Path("runs/ladder"), help="for table and picture (default: %(default)s)"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
