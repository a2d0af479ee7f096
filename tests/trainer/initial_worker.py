"""``python -m tests.trainer.initial_worker CONFIG CASES OUT``: what engines hold that start from given weights."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.initial import open_initial
from tests.trainer.checkpoints.saved_runs import masters_of, save_cases
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.engine import build_engine
from trainer.initial import GivenWeights


def _start(config: PretrainConfig, folder: Path, world: World) -> None:
    assert config.init is not None
    given = open_initial(config.init, config.model, Path(config.data.dir), world)
    assert isinstance(given, GivenWeights)
    engine = build_engine(config, world)
    given.put_into(engine, world)
    masters = masters_of(engine, config)
    if world.is_main:
        folder.mkdir(parents=True)
        torch.save(masters, folder / "masters.pt")
    engine.destroy()


if __name__ == "__main__":
    save_cases(PretrainConfig, _start)
