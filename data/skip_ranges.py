"""Samples that a run skips (``data.skip_ranges``), and what a position in the data means with them.

A run's position is the number of samples that it has consumed; its next sample's id is that number, advanced past every
range before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

Ranges = Sequence[Sequence[int]]
"""Ascending; each [first, end)."""


def pass_over(consumed: np.ndarray, skip_ranges: Ranges) -> np.ndarray:
    """Sample ids, int64 [N], when the samples in ``skip_ranges`` (ascending, [first, end)) are never taken."""
    sample_ids = consumed
    for first, end in skip_ranges:
        sample_ids = np.where(sample_ids >= first, sample_ids + (end - first), sample_ids)
    return sample_ids


def sample_ids(consumed_before: int, consumed: int, skip_ranges: Ranges) -> tuple[int, int]:
    """The first and the last sample of those after the first ``consumed_before``, up to ``consumed`` in all."""
    ends = np.array([consumed_before, consumed - 1])
    first, last = pass_over(ends, skip_ranges).tolist()
    return first, last


def refuse_other_past(then: Ranges, now: Ranges, consumed: int) -> None:
    """Raise ValueError unless both ``data.skip_ranges`` lead to the same sample after ``consumed`` samples.

    The position in the data is the number of samples consumed. Removing a range would move all later samples back, and
    a range added where the run has already been would skip other samples than it names.
    """
    reached = sample_ids(0, consumed, then)[1] + 1 if consumed else 0
    past_then, past_now = ([list(r) for r in ranges if r[0] < reached] for ranges in (then, now))
    if past_then != past_now:
        raise ValueError(
            f"the checkpoint was trained up to sample {reached} and skipped {past_then} before it, but "
            f"data.skip_ranges now says {past_now}; keep those ranges and only add ones from {reached} on "
            f"(data.skip_ranges={json.dumps(past_then, separators=(',', ':'))}), or go back to an earlier step with "
            "launch.rewind"
        )
