"""Decoders get their weights from elsewhere: nothing is drawn, and on a disk nothing stays behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.config import EnsembleConfig
from model.decoder import Decoder
from model.init import initialise
from tests.model import tiny
from trainer.checkpoints.empty_decoder import allocate, without_memory
from tune.adapters import prepare
from tune.config import AdapterConfig

ENSEMBLE = EnsembleConfig(layers=2)


def outline(**sizes: object) -> Decoder:
    config = tiny.config()
    return without_memory(type(config).model_validate({**config.model_dump(), **sizes}), 3, ENSEMBLE)


@pytest.mark.parametrize("on_disk", [False, True])
def test_it_is_the_decoder_that_is_built_with_memory(tmp_path: Path, on_disk: bool) -> None:
    made = outline(tied_head=True, router={"kind": "random", "density": 0.5, "granularity": "module"})
    assert all(parameter.is_meta for parameter in made.parameters())
    allocate(made, tmp_path if on_disk else None)
    assert made.lm_head.weight is made.embed_tokens.weight and not made.training
    built = Decoder(made.config, seed=3).eval()
    built.add_ensemble(ENSEMBLE)
    initialise(built, made.config, 1)
    made.load_state_dict(built.state_dict())
    assert all(p.data_ptr() % 64 == 0 and p.is_contiguous() and p.requires_grad for p in made.parameters())
    tokens = tiny.random_tokens()
    assert torch.equal(made(tokens).logits, built(tokens).logits)  # the sites' numbers, too: random routers go by them
    assert not list(tmp_path.iterdir())  # the file has no name


def test_what_trains_still_does(tmp_path: Path) -> None:
    made = outline()
    prepare(made, AdapterConfig(kind="dora", rank=2), "frozen", seed=1)
    trains = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    allocate(made, tmp_path)
    assert {name: parameter.requires_grad for name, parameter in made.named_parameters()} == trains
    assert len(set(trains.values())) == 2


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 4 KiB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_disk_without_room(tmp_path: Path) -> None:
    made = outline()
    with pytest.raises(
        OSError, match=r"reading the weights takes 0\.000 GB in .* not available there \(.*\); free some space, or"
    ):
        allocate(made, tmp_path)
    assert not os.listdir(tmp_path)
