"""Stage one: pretrain a decoder whose tokens learn which layers to skip.

    deepspeed --module pretrain.train configs/demo.yaml
    deepspeed --num_gpus 8 --module pretrain.train configs/skip_160m.yaml train.steps=2000
    torchrun --nproc-per-node 8 -m pretrain.train configs/skip_160m.yaml
    srun python -m pretrain.train configs/skip_1b.yaml train.checkpoint.resume=auto

Exit status: 0 when all steps are done; 75 when SIGTERM, SIGUSR1 or Ctrl-C asked to stop and the state was saved (start
again with train.checkpoint.resume=auto); 1 on an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from data.batches import Batch, TrainingData, step_sample_ids
from data.prefetch import prefetch
from settings import user_errors
from trainer.config import RunConfig, load_run
from trainer.describe import describe_end, describe_start
from trainer.distributed import World, join, leave
from trainer.guards import EXIT_PREEMPTED
from trainer.step import train_step
from trainer.trainer import Trainer


def train(config: RunConfig, config_path: Path, world: World) -> int:
    """Run to the last step, or until asked to stop; return the exit status.

    Raises:
        ValueError: for anything that the user can mend; what was saved stays.
    """
    data = TrainingData(config.data, pin_memory=world.device.type == "cuda")
    trainer = Trainer(config, config_path, data, world)
    trainer.log.info(describe_start(config, data, world))
    steps, save_every, evaluate_every = (
        config.train.steps,
        config.train.checkpoint.every_steps,
        config.train.evaluation.every_steps,
    )

    # The starting point, or what a kill between save and evaluation left undone.
    due = trainer.step % evaluate_every == 0 or trainer.step == steps
    evaluated = trainer.validate() if due and not trainer.metrics.has_evaluation(trainer.step) else None
    before = evaluated if trainer.step == 0 else None
    after = evaluated if trainer.step == steps else None
    trainer.metrics.open_bar()
    with prefetch(micro_batches(data, config, world, trainer.step, trainer.samples), depth=2) as loader:
        for batches in loader:
            lr = trainer.begin_step()
            result = train_step(
                trainer.engine, batches, trainer.budget, config, world, trainer.step, trainer.stop.requested
            )
            trainer.end_step(result, lr, loader.waited_s)

            # Save first, then evaluate: an evaluation that dies must not take the step with it.
            last = trainer.step == steps
            stopping = result.tally.stop > 0 and not last
            if last or stopping or trainer.step % save_every == 0:
                trainer.save()
            if stopping:
                trainer.log.info(f"asked to stop: step {trainer.step:,} is saved; start again with resume=auto")
                trainer.close()
                return EXIT_PREEMPTED
            if last or trainer.step % evaluate_every == 0:
                after = trainer.validate()

    trainer.metrics.close_bar()
    if after is None:
        trainer.log.info(f"all {steps:,} steps were done already; raise train.steps to go on")
    trainer.log.info(describe_end(config, before, after))
    trainer.close()
    return 0


def micro_batches(
    data: TrainingData, config: RunConfig, world: World, step: int, samples: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of every step from ``step`` on, ``samples`` windows into the data."""
    accumulation = config.accumulation(world.size)
    for number in range(config.train.steps - step):
        ids = step_sample_ids(
            samples + number * config.train.global_batch_samples,
            config.train.global_batch_samples,
            world.rank,
            world.size,
            config.train.micro_batch_samples,
            accumulation,
        )
        yield [data.batch(part) for part in ids]


def main() -> int:
    """Parse the command line, meet the other ranks, train."""
    parser = argparse.ArgumentParser(
        prog="pretrain.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML of the run, for example configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()
    with user_errors():
        config = load_run(arguments.config, arguments.overrides)
        world = join(config.train.timeout_s)
        status = train(config, arguments.config, world)
        leave()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
