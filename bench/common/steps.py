"""Consecutive training steps, outside a run."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import PretrainConfig
    from trainer.distributed import World
    from trainer.tally import StepResult


def stepper(engine: Any, config: PretrainConfig, world: World, first: int = 0) -> Callable[[], StepResult]:
    """A function that takes the next step on each call, from step ``first`` on, all at the peak learning rate.

    Steps end at ``train.steps``; ``train.stop_at_step`` is ignored.
    """
    from data.batches import TrainingData
    from model.budget import Budget
    from trainer.engine import set_learning_rate
    from trainer.loop import micro_batches
    from trainer.step import train_step

    config = config.model_copy(update={"train": config.train.model_copy(update={"stop_at_step": None})})
    budget, numbers = Budget(config.model, config.data.sequence_tokens, world.device), count(first)
    data = micro_batches(TrainingData(config.data), config, world, first, first * config.train.global_batch_samples)

    def step() -> StepResult:
        set_learning_rate(engine, 1.0)
        return train_step(engine, next(data), budget, config, world, next(numbers))

    return step
