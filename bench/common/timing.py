"""Fair timing on a shared machine: contestants take turns in one run, and only ratios within a turn are compared.

    round 1   A B C     ratio to A:  -  B1/A1  C1/A1
    round 2   A B C                  -  B2/A2  C2/A2      -> median and quartiles of each column

Other load on the machine affects neighbouring calls alike; times of separate runs are never compared.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

if TYPE_CHECKING:
    import torch

WARM_UP_ROUNDS = 2


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Of one or more values."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(low, median, high)


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call: each contestant once a round, in order, after ``WARM_UP_ROUNDS`` unmeasured rounds."""
    from trainer.monitor.peak_flops import seconds_of

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    bar = tqdm(total=(WARM_UP_ROUNDS + rounds) * len(contestants), unit="call", disable=not sys.stderr.isatty())
    with bar:
        for number in range(WARM_UP_ROUNDS + rounds):
            for name, call in contestants.items():
                bar.set_postfix_str(name, refresh=False)
                elapsed_s = seconds_of(call, device)
                if number >= WARM_UP_ROUNDS:
                    seconds[name].append(elapsed_s)
                bar.update()
    return seconds


def ratios(seconds: list[float], reference: list[float]) -> Spread:
    """Spread of the ratio within each round."""
    return Spread.of([a / b for a, b in zip(seconds, reference, strict=True)])
