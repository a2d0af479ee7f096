"""The training loop of both stages: step, save, evaluate, until all steps are done or a stop is requested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from data.batches import Batch, step_sample_ids
from data.prefetch import prefetch
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.trainer import Trainer


class TrainingStream(Protocol):
    """Training data: a pure function of how many samples were consumed."""

    def batch(self, consumed: Sequence[int] | range) -> Batch:
        """The samples at these places of the run."""


def train_loop(trainer: Trainer, data: TrainingStream) -> bool:
    """Train to the last step and its evaluation; False if the run was asked to stop before that, and saved.

    Raises:
        ValueError: for anything that the user can fix; saved checkpoints stay.
    """
    config: StageConfig = trainer.config
    train = config.train
    last_step, save_every, evaluate_every = train.last_step, train.checkpoint.every_steps, train.evaluation.every_steps
    resumed_at = trainer.step
    # The starting point, or what a stop or a kill between save and evaluation left undone.
    due = trainer.step % evaluate_every == 0 if trainer.step else train.evaluation.before_first
    due = due or trainer.step >= last_step
    if due and not trainer.metrics.has_evaluation(trainer.step) and not trainer.validate():
        trainer.stop_here()
        return False
    trainer.metrics.begin()
    trainer.begin_loading()
    with prefetch(micro_batches(data, config, trainer.world, trainer.step, trainer.samples), 2) as loader:
        for batches in loader:
            result = trainer.train_step(batches, loader.waited_s)

            # Save first, then evaluate: an evaluation that dies must not take the step with it.
            last = trainer.step == last_step
            stopping = result.tally.stop > 0 and not last
            if last or stopping or result.tally.save_due or trainer.step % save_every == 0:
                trainer.save(wait=last or stopping)
            asked = stopping and trainer.stop.agreed(trainer.world)  # else a save had failed, which has now worked
            if not asked and (last or trainer.step % evaluate_every == 0):
                asked = not trainer.validate() or (not last and trainer.stop.agreed(trainer.world))
            if asked:
                trainer.stop_here()
                return False
            trainer.begin_loading()
    trainer.stop.all_saved = True
    trainer.metrics.close_bar()
    if resumed_at >= last_step:
        field = "train.steps" if last_step == train.steps else "train.stop_at_step"
        trainer.log.info(f"nothing to do: the run is at step {trainer.step:,} already; raise {field} ({last_step:,})")
    return True


def micro_batches(
    data: TrainingStream, config: StageConfig, world: World, step: int, samples: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step from ``step`` on, ``samples`` windows into the data."""
    accumulation = config.accumulation(world.size)
    for number in range(config.train.last_step - step):
        ids = step_sample_ids(
            samples + number * config.train.global_batch_samples,
            config.train.global_batch_samples,
            world.data_rank,
            world.data_size,
            config.train.micro_batch_samples,
            accumulation,
        )
        yield [world.local_part(data.batch(part)) for part in ids]
