"""Loss spikes: steps whose loss or gradient norm is far above those before.

The rule is that of OLMo 2's spike score (arXiv:2501.00656): a value more than a set number of standard deviations from
the rolling mean, here over ``train.spike.window_steps`` steps and only above it. By Cantelli's inequality at most one
value in 1 + threshold^2 of any distribution is that high, so alternating easy and hard batches are no spikes; nor is
the fast fall at the start, which lies below its mean, or a slow rise, which the mean follows. The gradient norm's
logarithm is used, as its distribution has a long tail.

Steps of a spike are left out of the mean, or the spike would soon look normal. One that lasts as long as the window is
the new normal, and the window starts over, as it does where a stage of the mixture begins.

Everything here is computed from metrics that are the same on every rank, so every rank comes to the same verdict.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.skip_ranges import Ranges, sample_ids
from trainer.checkpoints.layout import checkpoints_of, newest_first, step_of
from trainer.config_blocks import SpikeConfig


@dataclass(frozen=True)
class Spike:
    """Steps in a row that are out of range.

    Attributes:
        first_step, last_step: numbers of the first one and of the last one so far.
        steps: their number, without skipped steps, which were not finite.
        consumed_before, consumed: samples that the run had consumed before the first one and after the last one.
        what: the value of the first one, and the range expected of it.
        end: how it ended; None while it lasts.
    """

    first_step: int
    last_step: int
    steps: int
    consumed_before: int
    consumed: int
    what: str
    end: str | None = None

    @property
    def is_news(self) -> bool:
        """True where it has just begun or ended."""
        return self.steps == 1 or self.end is not None

    def __str__(self) -> str:
        span = f"steps {self.first_step} to {self.last_step}" if self.last_step > self.first_step else ""
        return f"spike at {span or f'step {self.first_step}'}{f', which {self.end}' if self.end else ''}: {self.what}"


class SpikeDetector:
    """Judges one step after the other; its state is part of a checkpoint."""

    def __init__(self, config: SpikeConfig):
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._log_norms: deque[float] = deque(maxlen=config.window_steps)
        self._spike: Spike | None = None

    def observe(
        self, step: int, consumed_before: int, consumed: int, loss: float, grad_norm: float | None
    ) -> Spike | None:
        """Take in step number ``step`` (the first is 1).

        Args:
            step: optimiser steps done, this one included.
            consumed_before, consumed: samples that the run had consumed before and after it.
            loss: of all ranks, nats per token; finite.
            grad_norm: before clipping, finite; None where it is not known.

        Returns:
            The spike that this step began, continued or ended, if any.
        """
        log_norm = math.log(grad_norm) if grad_norm else None
        what = self._excess("loss", loss, self._losses, lambda value: f"{value:.4f}")
        if what is None and log_norm is not None:
            what = self._excess("gradient norm", log_norm, self._log_norms, lambda value: f"{math.exp(value):.4g}")
        before, self._spike = self._spike, None
        if what is None:
            self._losses.append(loss)
            if log_norm is not None:
                self._log_norms.append(log_norm)
            return None if before is None else replace(before, end="is over")
        if before is None:
            spike = Spike(step, step, 1, consumed_before, consumed, what)
        else:
            spike = replace(before, last_step=step, steps=before.steps + 1, consumed=consumed)
        if spike.steps >= self.config.window_steps:
            self.forget()
            return replace(spike, end="has lasted for train.spike.window_steps and counts as normal from now on")
        self._spike = spike
        return spike

    def forget(self) -> None:
        """Start the window over, as where the data change."""
        self._losses.clear()
        self._log_norms.clear()
        self._spike = None

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs."""
        spike = None if self._spike is None else asdict(self._spike)
        return {"losses": list(self._losses), "log_norms": list(self._log_norms), "spike": spike}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; of a longer window the newest values."""
        for values, saved in ((self._losses, state["losses"]), (self._log_norms, state["log_norms"])):
            values.clear()
            values.extend(saved)
        self._spike = None if state["spike"] is None else Spike(**state["spike"])

    def _excess(self, name: str, value: float, window: deque[float], show: Callable[[float], str]) -> str | None:
        """A description of ``value`` if it is out of range; None until the window is full."""
        if len(window) < self.config.window_steps:
            return None
        mean = math.fsum(window) / len(window)
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in window) / len(window))
        limit = mean + self.config.threshold * deviation
        if value <= limit:
            return None
        return (
            f"the {name} rose to {show(value)} from a mean of {show(mean)} over {len(window)} steps, above the limit "
            f"of {show(limit)} ({self.config.threshold:g} standard deviations above the mean)"
        )


def how_to_go_back(run: Path, spike: Spike, skip_ranges: Ranges) -> str:
    """The commands, as half a sentence, that rewind ``run`` to before ``spike`` and skip its samples."""
    before = next((found for found in newest_first(checkpoints_of(run)) if step_of(found) < spike.first_step), None)
    if before is None:
        return (
            "no checkpoint from before it is left to go back to; save more often or keep more "
            "(train.checkpoint.every_steps, keep, keep_every_steps)"
        )
    first, last = sample_ids(spike.consumed_before, spike.consumed, skip_ranges)
    others = [list(r) for r in skip_ranges if r[1] <= first or r[0] > last]
    ranges = json.dumps(sorted([*others, [first, last + 1]]), separators=(",", ":"))
    return (
        f"to go back before it: python -m launch.rewind {shlex.quote(str(run))} {step_of(before)}, then start again "
        f"with train.checkpoint.resume=required data.skip_ranges={ranges}"
    )
