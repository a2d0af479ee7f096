"""Stage two: tune a pretrained decoder, its last layers voting on the next token.

    deepspeed --module tune.train configs/tune_lora_ensemble.yaml base.path=runs/demo
    deepspeed --num_gpus 8 --module tune.train my.yaml train.steps=500 ensemble.layers=4
    torchrun --nproc-per-node 8 -m tune.train my.yaml
    srun python -m tune.train my.yaml train.checkpoint.resume=auto

Exit status: 0 when all steps are done; 75 when SIGTERM, SIGUSR1, SIGHUP or Ctrl-C asked to stop and the state was saved
(start again with train.checkpoint.resume=auto); 76 when it hung or lost a rank (the same, from the newest checkpoint);
78 on a user's mistake; anything else on a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.tokenization import load_text_tokenizer, require_vocabulary
from settings import looks_first
from trainer.command import run_stage
from trainer.exit_status import EXIT_PREEMPTED
from tune.config import TuneFile
from tune.examples import all_files
from tune.preflight import base_folder, require_apart, require_base
from tune.resolve import load_file, resolve

if TYPE_CHECKING:
    from trainer.distributed import World


def train(file: TuneFile, config_path: Path, world: World) -> int:
    """Run to the last step, or until asked to stop; return the exit status.

    Raises:
        ValueError: for anything that the user can fix; what was saved stays.
    """
    from trainer.loop import train_loop
    from trainer.monitor.summary import describe_end
    from trainer.tasks.live import open_tasks
    from tune.adapters import prepare, trainable_counts
    from tune.base import base_of
    from tune.batches import ExampleSet, TuningData
    from tune.describe import describe_start
    from tune.state_cache import StateCache
    from tune.tuner import Tuner

    base = base_of(file, world)
    config = resolve(file, base)
    tokenizer = load_text_tokenizer(config.tokenizer_folder)
    data = TuningData(config.data, tokenizer, pin_memory=world.device.type == "cuda")
    require_vocabulary(tokenizer, config.model.vocab_size)
    sets = [ExampleSet(config.data, source, tokenizer) for source in config.data.validation]
    tests = [ExampleSet(config.data, source, tokenizer) for source in config.data.test]

    decoder = base.decoder
    decoder.seed = config.base.seed or 0
    if config.ensemble is not None:
        decoder.add_ensemble(config.ensemble)
    peft = prepare(decoder, config.adapter, config.base.routers, config.train.seed)
    if config.base.cache_states is not None:
        decoder.frozen = StateCache(Path(config.base.cache_states), base.fingerprint, config.frozen_layers)
    tasks = open_tasks(config, config.tokenizer_folder, world)
    with Tuner(config, config_path, data, sets, world, decoder, tokenizer, tasks) as trainer:
        trainer.log.info(describe_start(trainer.config, base, data, [*sets, *tests], decoder, world))
        trained, total = trainable_counts(decoder)
        if trainer.step == 0:
            trainer.metrics.log_scalars(0, {"parameters/trained": trained, "parameters/total": total})
        if not train_loop(trainer, data):
            return EXIT_PREEMPTED
        trainer.save_adapter(peft)
        if not trainer.test(tests):
            return EXIT_PREEMPTED
        trainer.log.info(describe_end(config, trainer.evaluations))
    return 0


def load_checked(path: Path, overrides: Sequence[str]) -> TuneFile:
    """The config; on rank 0 also a look for its base and its files of examples, before torch is loaded.

    Raises:
        ValueError: for each mistake in it; if there is no such base, the run would write into it, or files are missing.
    """
    file = load_file(path, overrides)
    if looks_first():
        require_base(base_folder(file))
        require_apart(Path(str(file.train.run_dir)), Path(file.base.path))
        all_files(file.data)
    return file


def main() -> int:
    """Parse the command line, meet the other ranks, train."""
    return run_stage("tune.train", str(__doc__), "configs/tune_lora_ensemble.yaml", load_checked, train)


if __name__ == "__main__":
    raise SystemExit(main())
