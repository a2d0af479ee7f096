"""Windows of a validation set, in two disjoint parts: one to calibrate on, one to measure on.

The held-out part is what the training run evaluates on (evenly spread over the set), so losses can be compared with
its metrics. The calibration part is evenly spread over what is left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data.batches import Batch, ValidationSet
from data.config import DataConfig
from settings import did_you_mean


@dataclass(frozen=True)
class Windows:
    """Two parts of the validation set ``name``, in batches."""

    name: str
    calibration: list[Batch]
    held_out: list[Batch]


def open_set(config: DataConfig, name: str | None) -> ValidationSet:
    """The validation set called ``name``, or the first one.

    Raises:
        ValueError: if there is none of that name, or none at all; if the folder of the data is not there.
    """
    names = [source.name for source in config.validation]
    if not names:
        raise ValueError(
            "the run's config has no data.validation, so there is nothing to measure on; add a validation set"
        )
    if not Path(config.dir).is_dir():
        raise ValueError(
            f"there is no folder {config.dir}, which holds the validation sets: data.dir in the run's config, relative "
            "to the folder in which the run was started unless its path is absolute; run the command there, or copy "
            "the data to that path"
        )
    if name is None or name in names:
        return ValidationSet(config, name or names[0])
    raise ValueError(f"there is no validation set '{name}'; {did_you_mean(name, names)}")


def split(validation_set: ValidationSet, calibration: int, held_out: int, batch_samples: int) -> Windows:
    """``calibration`` windows and ``held_out`` other windows, ``batch_samples`` windows per batch.

    Raises:
        ValueError: if the set has too few windows, or one of the parts would be empty.
    """
    if min(calibration, held_out) < 1:
        raise ValueError(
            f"calibration ({calibration}) and held-out windows ({held_out}) must be at least 1 each; one part sets the "
            "thresholds and the other measures them"
        )
    if calibration + held_out > validation_set.samples:
        raise ValueError(
            f"validation set {validation_set.name} has {validation_set.samples} windows, fewer than {calibration} to "
            f"calibrate on and {held_out} others to measure on; lower --calibration-samples or --samples"
        )
    measured = _spread(validation_set, held_out)
    taken = {int(row.sample_ids) for row in measured}
    rest = [row for row in _spread(validation_set, calibration + held_out) if int(row.sample_ids) not in taken]
    chosen = [rest[place * len(rest) // calibration] for place in range(calibration)]
    return Windows(validation_set.name, _stack(chosen, batch_samples), _stack(measured, batch_samples))


def _spread(validation_set: ValidationSet, samples: int) -> list[Batch]:
    """``samples`` windows, evenly spread over the set, one per batch."""
    return list(validation_set.batches(0, 1, 1, samples))


def _stack(rows: list[Batch], batch_samples: int) -> list[Batch]:
    return [_join(rows[first : first + batch_samples]) for first in range(0, len(rows), batch_samples)]


def _join(rows: list[Batch]) -> Batch:
    parts: dict[str, list[Any]] = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Batch)}
    joined: dict[str, Any] = {name: None if part[0] is None else torch.cat(part) for name, part in parts.items()}
    return Batch(**joined)
