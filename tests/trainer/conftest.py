"""One rank in the test's own process, and configs made from the tiny run."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.config import DataConfig
from data.prepare.run import prepare
from data.tokenizer import train_tokenizer
from pretrain.train import train
from settings import user_errors
from settings.load import _apply_override
from tests.once import once
from trainer.config import PretrainConfig, load_run
from trainer.distributed import World, join, leave
from trainer.exit_status import EXIT_MISTAKE


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process as the only rank, with one thread; joined once for all tests.

    These models are so small that a second thread only waits for the first: a hundred times slower on a busy machine.
    """
    before, threads = dict(os.environ), torch.get_num_threads()
    joined = join(60.0)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # commands that other tests start are no rank
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    yield joined
    leave()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def configure(tiny: dict[str, Any]) -> Callable[..., PretrainConfig]:
    """The tiny run's config with ``key.sub=value`` overrides, which change ``tiny`` itself too."""

    def make(*overrides: str) -> PretrainConfig:
        for override in overrides:
            _apply_override(tiny, override)
        return PretrainConfig.model_validate(yaml.safe_load(yaml.safe_dump(tiny)))

    return make


@pytest.fixture(scope="session")
def mixed_corpus(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> dict[str, Any]:
    """A corpus with a second source, ``few``, that gives a quarter of the samples."""
    (few,) = corpus["validation"][0]["files"]
    sources = [
        {**corpus["sources"][0], "weight": 3.0},
        {"name": "few", "format": "text", "files": [few], "weight": 1.0},
    ]

    def make(folder: Path) -> None:
        config = DataConfig.model_validate(corpus | {"dir": str(folder), "sources": sources})
        train_tokenizer(config)
        prepare(config, workers=1)

    return corpus | {"dir": str(once(tmp_path_factory, "mixed", make)), "sources": sources}


@pytest.fixture
def mixed(mixed_corpus: dict[str, Any]) -> dict[str, Any]:
    """The ``data`` block of the corpus with two sources, a copy."""
    return copy.deepcopy(mixed_corpus)


@pytest.fixture
def train_here(
    world: World, write_config: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """Stage one in this process: takes a config and overrides, returns the exit status as the command would."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}

    def run(config: dict[str, Any], *overrides: str) -> int:
        path = write_config(config)
        try:
            with user_errors(EXIT_MISTAKE):
                return train(load_run(path, overrides), Path(path), world)
        except SystemExit as end:
            return int(str(end.code))

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
