"""Engines and steps in the test's own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from data.batches import TrainingData
from model.budget import Budget
from trainer.checkpoints.save import Saver
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.engine import build_engine, set_learning_rate
from trainer.loop import micro_batches
from trainer.step import train_step
from trainer.tally import StepResult


@contextmanager
def engine_for(config: PretrainConfig, world: World) -> Iterator[Any]:
    """A fresh engine, destroyed at the end so that the next one finds no hooks of it."""
    engine = build_engine(config, world)
    try:
        yield engine
    finally:
        engine.destroy()


def take_steps(engine: Any, config: PretrainConfig, world: World, count: int, first: int = 0) -> list[StepResult]:
    """``count`` steps at the peak rate, from step ``first`` on."""
    budget = Budget(config.model, config.data.sequence_tokens, world.device)
    results = []
    samples = first * config.train.global_batch_samples
    data = micro_batches(TrainingData(config.data), config, world, first, samples)
    for step, batches in zip(range(first, first + count), data, strict=False):
        set_learning_rate(engine, 1.0)
        results.append(train_step(engine, batches, budget, config, world, step))
    assert len(results) == count
    return results


def losses(config: PretrainConfig, world: World, count: int) -> list[float]:
    """The losses of the first ``count`` steps of a fresh engine."""
    with engine_for(config, world) as engine:
        return [result.tally.loss for result in take_steps(engine, config, world, count)]


def weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter, whole, in the precision of the forward pass; not for ZeRO 3."""
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def save_now(
    engine: Any, folder: Path, step: int, state: dict[str, Any], fingerprint: str, config: PretrainConfig, world: World
) -> Path:
    """Save a checkpoint and wait until it is whole; returns its folder."""
    saver = Saver(folder, fingerprint, config, world)
    saved = saver.save(engine, step, state)
    saver.wait()
    return saved
