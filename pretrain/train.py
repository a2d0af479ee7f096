"""Stage one: pretrain a decoder whose tokens learn which layers to skip.

    deepspeed --module pretrain.train configs/demo.yaml
    deepspeed --num_gpus 8 --module pretrain.train configs/skip_160m.yaml train.steps=2000
    torchrun --nproc-per-node 8 -m pretrain.train configs/skip_160m.yaml
    srun python -m pretrain.train configs/skip_1b.yaml train.checkpoint.resume=auto

Exit status: 0 when all steps are done; 75 when SIGTERM, SIGUSR1, SIGHUP or Ctrl-C asked to stop and the state was saved
(start again with train.checkpoint.resume=auto); 76 when it hung or lost a rank (the same, from the newest checkpoint);
78 on a user's mistake; anything else on a failure.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from settings import looks_first
from trainer.command import run_stage
from trainer.config import PretrainConfig, load_run
from trainer.exit_status import EXIT_PREEMPTED
from trainer.preflight import require_initial

if TYPE_CHECKING:
    from data.batches import TrainingData, ValidationSet
    from trainer.distributed import World


def train(config: PretrainConfig, config_path: Path, world: World) -> int:
    """Run to the last step, or until asked to stop; return the exit status.

    Raises:
        ValueError: for anything that the user can fix; saved checkpoints stay.
    """
    from pretrain.initial import open_initial
    from trainer.loop import train_loop
    from trainer.monitor.summary import describe_end, describe_start
    from trainer.tasks.live import open_tasks
    from trainer.trainer import Trainer

    data, validation_sets = open_data(config, world)
    tasks = open_tasks(config, config.tokenizer_folder, world)
    initial = None
    if config.init is not None:
        initial = partial(open_initial, config.init, config.model, config.tokenizer_folder, world)
    with Trainer(
        config, config_path, data.fingerprint, validation_sets, world, initial=initial, tasks=tasks
    ) as trainer:
        trainer.log.info(describe_start(trainer.config, data, world))
        if not train_loop(trainer, data):
            return EXIT_PREEMPTED
        trainer.log.info(describe_end(config, trainer.evaluations))
    return 0


def open_data(config: PretrainConfig, world: World) -> tuple[TrainingData, list[ValidationSet]]:
    """Open training and validation data; rank 0 checks every shard's files for all ranks; collective.

    Raises:
        ValueError: if they are missing, damaged or do not match the config; on every rank.
    """
    from data.batches import open_all

    found, problem, pin_memory = None, None, world.device.type == "cuda"
    if world.is_main:
        try:
            found = open_all(config.data, pin_memory)
        except ValueError as error:
            problem = str(error)
    if problem := world.broadcast_object(problem):
        raise ValueError(problem)
    return found or open_all(config.data, pin_memory, check_files=False)


def load_prepared(path: Path, overrides: Sequence[str]) -> PretrainConfig:
    """Load the config; on rank 0 also check for its prepared data and what it starts from, before torch is loaded.

    Raises:
        ValueError: for each mistake in it; if the tokenizer or a prepared source is missing, or init.path is not a
            folder.
    """
    from data.shards import MANIFEST_NAME, Manifest, read_model
    from data.store import train_folder, validation_folder
    from data.tokenization import tokenizer_file

    config = load_run(path, overrides)
    if not looks_first():
        return config
    data = config.data
    folders = [train_folder(data, source.name) for source in data.sources]
    folders += [validation_folder(data, source.name) for source in data.validation]
    try:
        tokenizer_file(data.dir)
        for folder in folders:
            read_model(folder / MANIFEST_NAME, Manifest)
    except ValueError as error:
        config_words = shlex.join([str(path), *overrides])
        message = re.sub(r"(?<=python -m data\.)(\w+) CONFIG\b", lambda found: f"{found[1]} {config_words}", str(error))
        raise ValueError(message) from None
    require_initial(config)
    return config


def main() -> int:
    """Parse the command line, meet the other ranks, train."""
    return run_stage("pretrain.train", str(__doc__), "configs/demo.yaml", load_prepared, train)


if __name__ == "__main__":
    raise SystemExit(main())
