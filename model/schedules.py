"""Schedules over a run, which a config gives in shares of its steps or in steps."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field, model_validator

from settings import Strict


class Progress(NamedTuple):
    """How far a run has got."""

    step: float
    """Optimiser steps done."""
    steps: float
    """Optimiser steps of the whole run."""

    def place(self, share: float | None, step: int | None) -> float:
        """The step that a config names, as a share of the run or, if that is given, as a step."""
        return (share or 0.0) * self.steps if step is None else float(step)


class Ramp(Strict):
    """A value that moves linearly from ``start`` to ``end`` over part of the run, then stays constant."""

    start: float
    """Value at the first step."""
    end: float
    """Value once the line has ended."""
    until: float | None = Field(None, gt=0, le=1)
    """Where the line ends, as a share of all training steps; this or ``until_step``."""
    until_step: int | None = Field(None, gt=0)
    """Where the line ends, as a step, independent of the run's length."""

    @model_validator(mode="after")
    def _one_end(self) -> Ramp:
        if (self.until is None) == (self.until_step is None):
            raise ValueError(
                f"a ramp must end at exactly one of until, a share of the run, and until_step, got {self.until} and "
                f"{self.until_step}; give one"
            )
        return self

    def at(self, progress: Progress) -> float:
        """The value at ``progress``."""
        end = progress.place(self.until, self.until_step)
        return self.start + (self.end - self.start) * min(progress.step / end, 1.0)


class DensityRamp(Strict):
    """Ramp of the target density down from 1; by default there is none."""

    dense_until: float = Field(0.0, ge=0, lt=1)
    """The target stays at 1 (every token executed) for this share of the training steps."""
    reach_by: float = Field(0.0, ge=0, le=1)
    """The target then falls linearly to ``router.density``, reached at this share of the steps."""
    dense_until_step: int | None = Field(None, ge=0)
    """The same in steps, independent of the run's length; instead of ``dense_until``."""
    reach_by_step: int | None = Field(None, gt=0)
    """The same in steps; instead of ``reach_by``."""

    def target(self, density: float, progress: Progress) -> float:
        """Density asked for at ``progress``: 1, then a line down to ``density``."""
        reach_by = self.reached(progress)
        if progress.step >= reach_by:
            return density
        dense_until = progress.place(self.dense_until, self.dense_until_step)
        if progress.step < dense_until:
            return 1.0
        return 1.0 + (density - 1.0) * (progress.step - dense_until) / (reach_by - dense_until)

    def reached(self, progress: Progress) -> float:
        """The step from which on the target is constant."""
        return progress.place(self.reach_by, self.reach_by_step)

    @model_validator(mode="after")
    def _ordered(self) -> DensityRamp:
        in_steps = self.dense_until_step is not None or self.reach_by_step is not None
        if in_steps and (self.dense_until or self.reach_by):
            raise ValueError(
                "the density's ramp is given both in shares of the run (dense_until, reach_by) and in steps "
                "(dense_until_step, reach_by_step); use only one of the two"
            )
        ends = (self.dense_until_step or 0, self.reach_by_step or 0) if in_steps else (self.dense_until, self.reach_by)
        if ends[1] < ends[0]:
            unit = "_step" if in_steps else ""
            raise ValueError(
                f"budget.reach_by{unit} ({ends[1]}) must not be less than budget.dense_until{unit} ({ends[0]})"
            )
        return self
