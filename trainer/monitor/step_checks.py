"""The checks after every step: whether it went bad, whether it is part of a spike, whether a stage begins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data.skip_ranges import sample_ids
from data.stages import stage_after
from trainer.checkpoints.layout import checkpoints_of
from trainer.config import StageConfig
from trainer.monitor.spikes import SpikeDetector, how_to_go_back
from trainer.monitor.stop import bad_step, too_many_bad_steps
from trainer.tally import StepResult


class Verdict(NamedTuple):
    """The result of the checks after a step.

    Attributes:
        warning: for the log.
        error: returns the sentence that ends the run; it names checkpoints, so call it once none is being written.
    """

    warning: str | None = None
    error: Callable[[], str] | None = None


class StepChecks:
    """Judges one step after the other, by metrics that are the same on every rank; its state is part of a checkpoint.

    Args:
        config: the run's.
        run: its folder, which the advice names.
    """

    def __init__(self, config: StageConfig, run: Path):
        self._config, self._run = config, run
        self._spikes = SpikeDetector(config.train.spike)
        self._bad_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs; the count of bad steps restarts at 0."""
        return self._spikes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._spikes.load_state_dict(state)

    def stage_begun(self, samples: int) -> int | None:
        """Number of the stage that begins with this step, if any; the window of spikes then starts over.

        Args:
            samples: consumed, this step's included.
        """
        mixture, ranges = self._config.data.mixture(), self._config.data.skip_ranges
        before, now = (stage_after(mixture, consumed, ranges) for consumed in (self._before(samples), samples))
        if now <= before:
            return None
        self._spikes.forget()
        return now

    def judge(self, step: int, samples: int, result: StepResult) -> Verdict:
        """Take in a step.

        Args:
            step: its number; the first is 1.
            samples: consumed, this step's included.
            result: of all ranks.
        """
        # In fp16 a gradient that overflows where every loss was finite only lowers the loss scale.
        if result.applied or (self._config.train.precision == "fp16" and not result.bad_ranks):
            self._bad_in_a_row = 0
            return self._judge_spike(step, samples, result) if result.applied else Verdict()
        self._bad_in_a_row += 1
        taken = sample_ids(self._before(samples), samples, self._config.data.skip_ranges)
        warning = bad_step(step, taken, result.bad_ranks)
        if self._bad_in_a_row < self._config.train.max_bad_steps:
            return Verdict(warning)
        return Verdict(warning, partial(too_many_bad_steps, self._bad_in_a_row, step, checkpoints_of(self._run)))

    def _judge_spike(self, step: int, samples: int, result: StepResult) -> Verdict:
        """A warning when a spike begins or ends, with how to rewind; an error if it is to end the run."""
        train, ranges = self._config.train, self._config.data.skip_ranges
        spike = self._spikes.observe(step, self._before(samples), samples, result.tally.loss, result.grad_norm)
        if spike is None:
            return Verdict()
        ends = train.spike.action == "stop" and spike.end is None and spike.steps >= train.max_bad_steps
        if not (ends or spike.is_news):
            return Verdict()
        first, last = sample_ids(spike.consumed_before, spike.consumed, ranges)

        def sentence() -> str:
            return f"{spike}; its samples are {first} to {last}; {how_to_go_back(self._run, spike, ranges)}"

        if ends:
            return Verdict(error=lambda: f"{sentence()}; train.spike.action stop ended the run")
        return Verdict(sentence())

    def _before(self, samples: int) -> int:
        """Samples consumed before the step."""
        return samples - self._config.train.global_batch_samples
