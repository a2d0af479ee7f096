"""The contents of ``dial.json``, and the thresholds for any density in its range.

Dimension letters: S routed sites.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from data.files import read_json
from model.config import ModelConfig
from model.router import thresholds_of
from settings import Strict


class Point(Strict):
    """One setting of the dial, calibrated and measured."""

    density: float
    """Mean density asked for: of the calibration tokens, the share that executes a site, mean over the sites."""
    trained: bool
    """True for the point the model was trained for: its own thresholds, 0 unless training moved them."""
    thresholds: list[float | None]
    """[S]: a token executes a site where its margin reaches the threshold; null for minus infinity: all do."""
    site_targets: list[float]
    """[S]: target density of each site."""
    calibration_density: float
    """Mean density reached on the calibration windows."""
    held_out_density: float
    """Mean density reached on the held-out windows."""
    held_out_site_densities: list[float]
    """[S]: the same at each site."""
    flops_per_token: float
    """Forward FLOPs executed on the held-out windows, head included."""
    dense_flops_per_token: float
    """Forward FLOPs of the same tokens in the model without routers."""
    loss: float
    """On the held-out windows, nats per token."""


class Dial(Strict):
    """A checkpoint's settings, lowest density first."""

    model: str
    """Fingerprint of the model's config."""
    step: int
    """The checkpoint's number of optimiser steps."""
    validation_set: str
    """Where the windows come from."""
    calibration_windows: int
    """How many windows the thresholds were set on."""
    held_out_windows: int
    """How many others everything else was measured on."""
    window_tokens: int
    """Tokens of a window."""
    sites: list[str]
    """Names of the S routed sites, first layer first."""
    points: list[Point]
    """The settings, lowest density first; the trained one is among them."""
    lowest_margins: list[float]
    """[S]: each site's smallest calibration margin at the last point, where the interpolation to density 1 ends."""

    @staticmethod
    def load(path: Path, model: ModelConfig | None = None, step: int | None = None) -> Dial:
        """Read a ``dial.json``.

        Args:
            path: of the file.
            model: the config of the model to use it with, to make sure that it is the one that was calibrated.
            step: its optimiser steps, for the same reason.

        Raises:
            ValueError: if it is not such a file, or one of another model or checkpoint.
        """
        if not path.is_file():
            raise ValueError(f"there is no dial {path}; calibrate one with {_calibrate(path)}")
        try:
            dial = Dial.model_validate(read_json(path))
        except (ValidationError, ValueError) as error:
            raise ValueError(
                f"{path} is not a dial of this version ({str(error).splitlines()[0]}); calibrate it again with "
                f"{_calibrate(path)}"
            ) from None
        if model is not None and dial.model != fingerprint(model):
            raise ValueError(
                f"{path} is the dial of another model (its config's fingerprint is {dial.model[:12]}, this one's is "
                f"{fingerprint(model)[:12]}); calibrate this model's with {_calibrate(path)}"
            )
        if step is not None and dial.step != step:
            raise ValueError(
                f"{path} was calibrated at step {dial.step}, these weights are of step {step}; calibrate them with "
                f"{_calibrate(path)}"
            )
        return dial

    @property
    def trained(self) -> Point:
        """The point the model was trained for."""
        return next(point for point in self.points if point.trained)

    def thresholds(self, density: float) -> Tensor:
        """Thresholds fp32 [S] for a mean ``density``, above 0 and at most 1; minus infinity at 1, if it was calibrated.

        Between two points each site's threshold is interpolated linearly in the log-odds of its density, because
        margins are roughly logistic. So in between, the executed density is only close to the one asked for; where it
        matters, calibrate that density, too. A density outside the points gives the nearest one, with a warning.
        """
        if not 0 < density <= 1:
            raise ValueError(f"a density must be above 0 and at most 1, got {density:g}")
        nearest = min(max(density, self.points[0].density), self.points[-1].density)
        if nearest != density:
            warnings.warn(
                f"density {density:g} is outside the calibrated range ({self.points[0].density:.3f} to "
                f"{self.points[-1].density:.3f}), so the nearest point is used; calibrate it with --densities",
                stacklevel=2,
            )
        if nearest == self.points[-1].density:
            return thresholds_of(self.points[-1].thresholds)
        above = next(place for place, point in enumerate(self.points) if point.density > nearest)
        low, high = self.points[max(above - 1, 0)], self.points[above]
        share = (nearest - low.density) / (high.density - low.density)
        if share == 0:
            return thresholds_of(low.thresholds)
        return torch.tensor([self._between(site, low, high, share) for site in range(len(self.sites))])

    def _between(self, site: int, low: Point, high: Point, share: float) -> float:
        start, end = (self.lowest_margins[site] if (t := p.thresholds[site]) is None else t for p in (low, high))
        first, last = low.site_targets[site], high.site_targets[site]
        # The calibration tokens cannot distinguish densities closer to 0 or 1 than this.
        least = 0.5 / (self.calibration_windows * self.window_tokens)
        odds = [_log_odds(min(max(d, least), 1 - least)) for d in (first, last, first + share * (last - first))]
        way = (odds[2] - odds[0]) / (odds[1] - odds[0]) if odds[1] != odds[0] else share
        return start + way * (end - start)


def fingerprint(model: ModelConfig) -> str:
    """SHA-256 of the non-default values of a model's config; a new field at its default does not change it.

    How executed tokens are computed (``router.execution``) is left out: the same tokens execute.
    """
    decisive = model.model_dump(mode="json", exclude_defaults=True, exclude={"router": {"execution"}})
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def _calibrate(path: Path) -> str:
    """The command that writes a dial to ``path``, in a run or in another folder."""
    folder = path.parent  # a run's own is RUN/dial
    return (
        f"python -m evals.dial {folder.parent}" if folder.name == "dial" else f"python -m evals.dial RUN --out {folder}"
    )
