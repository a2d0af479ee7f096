"""Stage one: pretrain a decoder whose tokens learn which layers to skip.

    deepspeed --module pretrain.train configs/demo.yaml
    deepspeed --num_gpus 8 --module pretrain.train configs/skip_160m.yaml train.steps=2000
    torchrun --nproc-per-node 8 -m pretrain.train configs/skip_160m.yaml
    srun python -m pretrain.train configs/skip_1b.yaml train.checkpoint.resume=auto

Exit status: 0 when all steps are done; 75 when SIGTERM, SIGUSR1 or Ctrl-C asked to stop and the state was saved (start
again with train.checkpoint.resume=auto); 76 when it hung or lost a rank (the same, from the newest checkpoint); 1 on an
error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from settings import user_errors
from trainer.config import RunConfig, load_run
from trainer.exit_status import EXIT_PREEMPTED
from trainer.monitor.stop import lost_rank
from trainer.opening import open_run

if TYPE_CHECKING:
    from trainer.distributed import World


def train(config: RunConfig, config_path: Path, world: World) -> int:
    """Run to the last step, or until asked to stop; return the exit status.

    Raises:
        ValueError: for anything that the user can mend; what was saved stays.
    """
    from data.batches import TrainingData, ValidationSet
    from trainer.loop import run
    from trainer.monitor.summary import describe_end, describe_start
    from trainer.trainer import Trainer

    data = TrainingData(config.data, pin_memory=world.device.type == "cuda")
    data.require_vocabulary(config.model.vocab_size)
    validation_sets = [ValidationSet(config.data, source.name) for source in config.data.validation]
    with Trainer(config, config_path, data.fingerprint, validation_sets, world) as trainer:
        trainer.log.info(describe_start(trainer.config, data, world))
        resumed_at = trainer.step
        if not run(trainer, data):
            return EXIT_PREEMPTED
        if resumed_at == config.train.steps:
            trainer.log.info(f"all {config.train.steps:,} steps were done already; raise train.steps to go on")
        trainer.log.info(describe_end(config, trainer.evaluations))
    return 0


def main() -> int:
    """Parse the command line, meet the other ranks, train."""
    parser = argparse.ArgumentParser(
        prog="pretrain.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML of the run, for example configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_args()
    with user_errors(), lost_rank():
        config = load_run(arguments.config, arguments.overrides)
        open_run(config.train)
        from trainer.distributed import join, leave

        world = join(config.train.timeout_s)
        status = train(config, arguments.config, world)
        leave()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
