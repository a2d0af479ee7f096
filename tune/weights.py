"""A tuned decoder out of a checkpoint, in one process: no ranks, no engine, and no code from pickles is run.

    decoder, config, step = load_tuned(Path("runs/demo-tuned"))

The decoder is a plain one with its ensemble, adapters merged. How the files are read:
:mod:`trainer.checkpoints.read_weights`.
"""

from __future__ import annotations

from pathlib import Path

from model.decoder import Decoder
from settings import load
from trainer.checkpoints.empty_decoder import allocate, without_memory
from trainer.checkpoints.read_weights import checkpoint_of, fill
from trainer.config import is_stage_two
from tune.adapters import merge, prepare
from tune.config import TuneConfig


def load_tuned(
    run_or_checkpoint: Path, merged: bool = True, disk: Path | None = None
) -> tuple[Decoder, TuneConfig, int]:
    """The decoder in evaluation mode, fp32 on the CPU; the config of its run; and the optimiser steps it has had.

    Args:
        run_or_checkpoint: a run folder, of which the newest whole checkpoint is taken, or one checkpoint's folder.
        merged: adapters are part of the weights that they sit on, and names are the base's.
        disk: keep the weights in a file without a name in this folder; in memory unless given.

    Raises:
        ValueError: if there is no whole checkpoint, or it is not of a tuning run, or it holds another model than its
            config says, or anything but tensors and numbers.
    """
    folder = checkpoint_of(run_or_checkpoint)
    if not is_stage_two(folder / "config.yaml"):
        raise ValueError(
            f"{folder} is of a stage-one run, which has nothing to merge; give a tuning run, or use that one as it is"
        )
    config = load(folder / "config.yaml", [], TuneConfig)
    decoder = without_memory(config.model, config.base.seed or 0, config.ensemble)
    prepare(decoder, config.adapter, config.base.routers, config.train.seed)
    allocate(decoder, disk)
    step = fill(decoder, folder, config.deepspeed.zero_stage)
    if merged:
        merge(decoder)
    return decoder.eval(), config, step
