"""Losses and densities on the named validation sets: the same windows every time, equally many on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from data.batches import Batch
from model.router import Router
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.step import forward_at, late_layers, to_device
from trainer.tally import Counter, Tally


class ValidationStream(Protocol):
    """A named validation set, the same batches every time."""

    name: str

    def batches(
        self, rank: int, world_size: int, batch_samples: int, limit_samples: int | None = None
    ) -> Iterator[Batch]:
        """This rank's batches, equally many on every rank; padding rows have sample id -1."""


@dataclass(frozen=True)
class Evaluation:
    """One validation set's result.

    Attributes:
        name: of the validation set.
        greedy: counts with greedy routing, as in generation.
        noisy: counts with the routers' training noise; None without a learned router, without noise, or if not asked
            for.
        executed: bool [S, T], greedy decisions on the set's first window, for the heat map; None without routers.
    """

    name: str
    greedy: Tally
    noisy: Tally | None
    executed: torch.Tensor | None


def evaluate(
    engine: Any, sets: Iterable[ValidationStream], config: StageConfig, world: World, step: int
) -> list[Evaluation]:
    """Evaluate after ``step`` optimiser steps."""
    router = config.model.router
    noisy = config.train.evaluation.with_noise and router is not None and router.learned
    if router is not None and not (router.noise.start or router.noise.end):
        noisy = False  # a run without noise: the pass would be the same
    results = []
    for validation_set in sets:
        greedy, executed = _pass(engine, validation_set, config, world, step, training=False)
        with_noise = _pass(engine, validation_set, config, world, step, training=True)[0] if noisy else None
        results.append(Evaluation(validation_set.name, greedy, with_noise, executed))
    engine.train()
    return results


@torch.no_grad()
def _pass(
    engine: Any, validation_set: ValidationStream, config: StageConfig, world: World, step: int, training: bool
) -> tuple[Tally, torch.Tensor | None]:
    engine.eval()
    if training:  # only the routers: an adapter's dropout is not routing noise
        for module in engine.module.modules():
            module.train(isinstance(module, Router))
    counter = Counter(len(config.model.sites), world.device, late_layers(engine))
    executed = None
    train = config.train
    ranks, samples = (world.data_rank, world.data_size), (train.micro_batch_samples, train.evaluation.samples)
    for batch in validation_set.batches(*ranks, *samples):
        # Padding rows are left out; if all rows are padding, one still runs, because under ZeRO every rank must.
        # (Padding rows have no targets, so the number of scored ones does not change.)
        real = int((batch.sample_ids >= 0).sum())
        batch = to_device(world.local_part(_first_rows(batch, max(real, 1))), world.device)
        output = forward_at(engine, batch, config, train.progress(step), sequence=world.sequence)
        if not real:
            continue
        counter.add(output, batch.targets, batch.scored_targets)
        if executed is None and output.routing.executed.numel():
            executed = output.routing.executed[:, 0]
            executed = (executed if world.sequence is None else world.sequence.all_gather(executed)).cpu()
    world.all_reduce_sum(counter.vector)
    return counter.tally(), executed


def _first_rows(batch: Batch, rows: int) -> Batch:
    return batch.map(lambda tensor: tensor[:rows])
