"""Either stage's config from one path, and the model that it trains, without reading any weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ModelConfig
from settings import load, peek
from trainer.checkpoints.layout import CONFIG
from trainer.checkpoints.run_tokenizer import tokenizer_of
from trainer.config import PretrainConfig, StageConfig, WeightsConfig, is_stage_two, load_run
from tune.config import TuneFile
from tune.resolve import load_file, resolve

if TYPE_CHECKING:
    from model.decoder import Decoder


def load_either(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig | TuneFile:
    """A stage-one config, or a stage-two one as written, told apart by its ``base`` block.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    return (load_file if is_stage_two(Path(path)) else load_run)(path, overrides)


def model_of(config: PretrainConfig | TuneFile) -> ModelConfig:
    """The model that is trained; for stage two from the config's own block, or from its base.

    Raises:
        ValueError: if the base is not there or does not say what model it is.
    """
    from tune.base import stage_two_model

    if isinstance(config, PretrainConfig):
        return config.model
    if config.model is not None:
        return config.model
    blocks = peek(Path(config.base.path) / CONFIG)
    if "model" not in blocks:
        raise ValueError(
            f"base.path {config.base.path} holds no config.yaml with a model block, from which the sizes are read; "
            "give base.path a stage-one run, one of its checkpoints, or what convert.from_hf wrote"
        )
    return stage_two_model(load(Path(config.base.path) / CONFIG, [], ModelConfig, block="model"), config.base)


def tokenizer_folder(file: TuneFile) -> Path:
    """Folder of stage two's tokenizer: from its config, or else its base's.

    Raises:
        ValueError: if the base is a run or a checkpoint, and its tokenizer is not found.
    """
    if file.data.tokenizer is not None:
        return Path(file.data.tokenizer)
    base = Path(file.base.path)
    data = peek(base / CONFIG).get("data")
    return tokenizer_of(base, Path(data["dir"])) if isinstance(data, dict) and "dir" in data else base


def without_storage(config: PretrainConfig | TuneFile) -> tuple[StageConfig, Decoder]:
    """The resolved config and its decoder on the meta device, with ``requires_grad`` as it will be trained.

    Raises:
        ValueError: if a stage-two config's blocks and base are incompatible.
    """
    import torch

    from model.decoder import Decoder

    model = model_of(config)
    with torch.device("meta"):
        decoder = Decoder(model)
    if isinstance(config, PretrainConfig):
        return config, decoder
    from tune.adapters import prepare  # PEFT and transformers: doubles the import time
    from tune.base import Base
    from tune.load import Loaded

    loaded = Loaded(decoder, WeightsConfig(model=model), None, Path(config.base.path))
    resolved = resolve(config, Base(loaded, "", config.base.sha256 or ""))
    if resolved.ensemble is not None:
        decoder.add_ensemble(resolved.ensemble)
    prepare(decoder, resolved.adapter, resolved.base.routers, resolved.train.seed)
    return resolved, decoder
