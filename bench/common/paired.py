"""Significance tests for two contestants, compared on the same seeds or on the same examples.

Nothing is assumed about distributions: under the null hypothesis that the two are interchangeable, each difference
could equally have the other sign, and the p-value is the share of sign assignments whose result is at least as extreme
(Fisher 1935's exact randomisation test). Where both examples and seeds are random, the bootstrap resamples both
(Efron 1979; pigeonhole bootstrap, Owen 2007).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ENUMERATED = 20
"""Up to this many differences, all sign patterns are enumerated: a million."""
_DRAWN = 100_000
"""Sign patterns drawn at random for more differences than that."""


class Paired(NamedTuple):
    """Differences between two contestants, pair by pair.

    Attributes:
        mean: of the differences.
        error: standard error of the mean; None for fewer than two pairs.
        p: two-sided, of the exact sign-flip test. For n pairs it cannot be below 2 / 2^n.
    """

    mean: float
    error: float | None
    p: float

    def sentence(self) -> str:
        """How far from 0: ``-3.1 standard errors, p 0.06``."""
        if not self.error:
            return f"p {self.p:.2g}"
        return f"{self.mean / self.error:+.1f} standard errors, p {self.p:.2g}"


def by_signs(differences: Sequence[float]) -> Paired:
    """Sign-flip test on the differences of pairs: exact up to 20, beyond that with random signs, the same every time.

    Raises:
        ValueError: if there are none.
    """
    if not differences:
        raise ValueError("the test by signs takes at least 1 pair, got none")
    observed = abs(math.fsum(differences)) * (1 - 1e-12)  # tolerates rounding in another order of summation
    if len(differences) <= _ENUMERATED:
        sums = np.zeros(1)
        for difference in differences:
            sums = np.concatenate([sums + difference, sums - difference])
        p = float((np.abs(sums) >= observed).mean())
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (_DRAWN, len(differences)))
        p = float((1 + (np.abs(signs @ np.asarray(differences)) >= observed).sum()) / (1 + _DRAWN))
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Paired(statistics.fmean(differences), error, p)


def by_examples(differences: Sequence[Sequence[float]], draws: int = 4000) -> tuple[float, float, float]:
    """Mean of the differences [S seeds, E examples], and its 95 % interval from a bootstrap over both at once.

    With one seed only the examples are resampled. The draws are the same every time.
    """
    table, drawn = np.asarray(differences, dtype=float), np.random.default_rng(0)
    seeds, examples = table.shape
    of_seeds = drawn.multinomial(seeds, [1 / seeds] * seeds, draws) / seeds
    of_examples = drawn.multinomial(examples, [1 / examples] * examples, draws) / examples
    low, high = np.quantile(((of_seeds @ table) * of_examples).sum(axis=1), [0.025, 0.975])
    return float(table.mean()), float(low), float(high)
