"""Load a decoder from a run of either stage, one of its checkpoints, or a folder of weights.

    loaded = load_model(Path("runs/demo-tuned"))
    loaded.decoder, loaded.config, loaded.source

One process, no ranks, no engine, and no code from pickles is run; how the files are read is described in
:mod:`trainer.checkpoints.read_weights` and :mod:`trainer.checkpoints.weights_folder`. With ``disk`` the weights stay in
a file (:mod:`trainer.checkpoints.empty_decoder`).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from model.decoder import Decoder
from settings import load
from trainer.checkpoints import manifest
from trainer.checkpoints.empty_decoder import allocate, without_memory
from trainer.checkpoints.layout import CONFIG, is_run
from trainer.checkpoints.read_weights import checkpoint_of, fill, thresholds_in
from trainer.checkpoints.run_tokenizer import tokenizer_of
from trainer.checkpoints.weights_folder import is_weights_folder, read_empty, read_weights
from trainer.config import PretrainConfig, WeightsConfig, is_stage_two
from trainer.distributed import ALONE, World
from tune.config import TuneConfig


class Loaded(NamedTuple):
    """A decoder, and where it came from."""

    decoder: Decoder
    """fp32, on the CPU, in evaluation mode; adapters merged unless asked otherwise, the ensemble on."""
    config: PretrainConfig | TuneConfig | WeightsConfig
    """The config found beside the weights; its type tells what was read."""
    step: int | None
    """Optimiser steps that the weights have had; None for a folder of weights."""
    source: Path
    """The checkpoint's folder or the folder of weights."""

    @property
    def tokenizer_folder(self) -> Path:
        """Holds ``tokenizer.model`` or ``tokenizer.json``; in a folder of weights that is not checked.

        Raises:
            ValueError: see :func:`trainer.checkpoints.run_tokenizer.tokenizer_of`.
        """
        if isinstance(self.config, WeightsConfig):
            return self.source
        return tokenizer_of(self.source, self.config.tokenizer_folder)


def load_model(path: Path, merged: bool = True, disk: Path | None = None) -> Loaded:
    """The decoder that ``path`` holds.

    Args:
        path: a run folder of stage one or two, for its newest whole checkpoint (torn ones are reported on stderr and
            skipped), one checkpoint's folder, or a folder of weights (what ``convert.from_hf``, ``convert.average``
            and ``tune.merge`` write).
        merged: merge a tuned run's adapters into their weights, so that names are the base's.
        disk: keep the weights in an unnamed file in this folder; in memory unless given.

    Raises:
        ValueError: if it holds none, or an incomplete one, or another model than its config says, or anything but
            tensors and numbers.
    """
    if is_weights_folder(path):
        decoder, weights_config = read_weights(path, disk)
        return Loaded(decoder, weights_config, None, path)
    loaded = load_empty(path)
    allocate(loaded.decoder, disk)
    assert not isinstance(loaded.config, WeightsConfig)
    step = fill(loaded.decoder, loaded.source, loaded.config.deepspeed.zero_stage)
    if loaded.decoder.ensemble is not None and isinstance(loaded.config, TuneConfig):
        loaded.decoder.ensemble.open(loaded.config.train.progress(step))
        loaded.decoder.ensemble.fold_closing_bias()
    if merged and isinstance(loaded.config, TuneConfig):
        from tune.adapters import merge  # PEFT

        merge(loaded.decoder)
    return loaded._replace(decoder=loaded.decoder.eval(), step=step)


def chosen(path: Path, world: World) -> Path:
    """The path that every rank gives to :func:`load_model`: for a run the checkpoint that rank 0 finds; collective.

    Otherwise a rank could find another one, if the run is still going on or its file system shows the newest late.

    Raises:
        ValueError: if the run has no whole one.
    """
    return checkpoint_of(path, world) if world.broadcast_object(world.is_main and is_run(path)) else path


def load_empty(path: Path) -> Loaded:
    """:func:`load_model` without the weights: the decoder is without storage, its adapters are not merged.

    Raises:
        ValueError: if ``path`` holds none, or an incomplete one.
    """
    if is_weights_folder(path):
        decoder, weights_config = read_empty(path)
        return Loaded(decoder, weights_config, None, path)
    if (path / "config.json").is_file():
        raise ValueError(
            f"{path} is a Hugging Face folder, not a run; import it with: python -m convert.from_hf {path} OUT, and "
            "give that folder"
        )
    return load_empty_checkpoint(checkpoint_of(path))


def load_empty_checkpoint(source: Path) -> Loaded:
    """:func:`load_empty` of a checkpoint's folder that is known to be whole."""
    step = manifest.read(source, ALONE)["step"]
    if not is_stage_two(source / CONFIG):
        config = load(source / CONFIG, [], PretrainConfig)
        decoder = without_memory(config.model, config.train.seed)
        decoder.thresholds = thresholds_in(source)
        return Loaded(decoder, config, step, source)
    from tune.adapters import prepare  # PEFT

    tuned = load(source / CONFIG, [], TuneConfig)
    decoder = without_memory(tuned.model, tuned.base.seed or 0, tuned.ensemble)
    prepare(decoder, tuned.adapter, tuned.base.routers, tuned.train.seed)
    decoder.thresholds = thresholds_in(source)
    return Loaded(decoder, tuned, step, source)
