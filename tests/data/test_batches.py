"""Batches: masks against a slow reference, ranks, resuming, validation sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import batches
from data.batches import Batch, TrainingData, ValidationSet, step_sample_ids
from data.config import DataConfig
from data.order import Order
from data.skip_ranges import pass_over
from model import chunks
from tests.data.helpers import config_of, documents, prepared, write_jsonl
from tests.data.test_store import everything

EOS = 2  # of every tokenizer that data.tokenizer trains


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with two sources and two validation sets, one of them with very few windows."""
    folder = tmp_path_factory.mktemp("batches")
    write_jsonl(folder / "second.jsonl", documents(80, seed=1))
    write_jsonl(folder / "few.jsonl", documents(3, seed=2))
    prepared(folder, **blocks(folder))
    return folder


def blocks(folder: Path) -> dict[str, Any]:
    return {
        "sources": [
            {"name": "main", "files": [str(folder / "raw.jsonl")], "weight": 0.7},
            {"name": "second", "files": [str(folder / "second.jsonl")], "weight": 0.3},
        ],
        "validation": [
            {"name": "held", "files": [str(folder / "second.jsonl")]},
            {"name": "few", "files": [str(folder / "few.jsonl")]},
        ],
    }


def reopened(folder: Path, **changes: Any) -> DataConfig:
    return config_of(folder, **(blocks(folder) | changes))


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_rows_against_a_slow_reference(folder: Path, confine: bool, restart: bool) -> None:
    config = reopened(folder, confine_attention=confine, restart_positions=restart)
    data = TrainingData(config)
    batch = data.batch(range(40))
    length = config.sequence_tokens
    assert batch.tokens.shape == batch.targets.shape == (40, length) and batch.tokens.dtype == torch.int64
    assert (batch.documents is not None) == confine and (batch.positions is not None) == restart
    stores = [everything(Path(config.dir) / "train" / name) for name in ("main", "second")]
    names = [source.name for source in config.sources]
    order = Order(names, [entry.windows for entry in data.summary(40)], config.mixture(), config.seed)
    sources, _, windows = order.locate(np.arange(40))
    assert batch.sources is not None and batch.sources.tolist() == sources.tolist()
    for row, (source, window) in enumerate(zip(sources, windows, strict=True)):
        tokens, ends = stores[source]
        document, position = 0, 0
        for place in range(length):
            at = window * length + place
            if place and at in ends:
                document, position = document + 1, 0
            elif place:
                position += 1
            closes = at + 1 in ends
            assert batch.tokens[row, place] == tokens[at]
            assert batch.targets[row, place] == (-100 if confine and closes else tokens[at + 1])
            if batch.documents is not None:
                assert batch.documents[row, place] == document
            if batch.positions is not None:
                assert batch.positions[row, place] == position
    if confine:
        assert (batch.targets == -100).any()
        assert (batch.tokens[batch.targets == -100] == EOS).all()
    assert batch.tokens.max() < data.vocab_size


def test_same_tokens_at_any_world_size_micro_batch_and_after_a_resume(folder: Path) -> None:
    config = reopened(folder)
    global_batch, steps = 24, 4
    expected = TrainingData(config).batch(range(steps * global_batch))
    for world_size, micro_batch in ((1, 24), (1, 4), (2, 4), (4, 2), (3, 8), (24, 1)):
        accumulation = global_batch // (world_size * micro_batch)
        for step in range(steps):
            seen: dict[int, torch.Tensor] = {}
            for rank in range(world_size):
                data = TrainingData(config)  # a fresh process at every step: nothing is remembered
                for ids in step_sample_ids(
                    step * global_batch, global_batch, rank, world_size, micro_batch, accumulation
                ):
                    batch = data.batch(ids)
                    assert batch.sample_ids.tolist() == list(ids) and len(ids) == micro_batch
                    seen |= dict(zip(ids, batch.tokens, strict=True))
            assert sorted(seen) == list(range(step * global_batch, (step + 1) * global_batch))
            for number, tokens in seen.items():
                assert torch.equal(tokens, expected.tokens[number])


def test_batch_sizes_that_do_not_multiply(folder: Path) -> None:
    with pytest.raises(ValueError, match="3 x accumulation 2 x world size 4 = 24, but the global batch is 32"):
        step_sample_ids(0, 32, 0, 4, 3, 2)


def test_skip_ranges_pass_over_samples(folder: Path) -> None:
    assert pass_over(np.arange(8), [(2, 4), (5, 9)]).tolist() == [0, 1, 4, 9, 10, 11, 12, 13]
    plain = TrainingData(reopened(folder))
    skipping = TrainingData(reopened(folder, skip_ranges=[(10, 20)]))
    batch = skipping.batch(range(8, 12))
    assert batch.sample_ids.tolist() == [8, 9, 20, 21]
    assert torch.equal(batch.tokens, plain.batch([8, 9, 20, 21]).tokens)
    assert skipping.fingerprint == plain.fingerprint
    for wrong in ([(5, 5)], [(-1, 2)], [(5, 9), (8, 12)]):
        with pytest.raises(ValueError, match=r"data\.skip_ranges"):
            reopened(folder, skip_ranges=wrong)


def test_fingerprint_changes_with_what_decides_the_order(folder: Path) -> None:
    base = TrainingData(reopened(folder)).fingerprint
    weights = blocks(folder)["sources"]
    weights[0]["weight"] = 0.6
    others = [reopened(folder, seed=1), reopened(folder, sequence_tokens=17), reopened(folder, sources=weights)]
    assert len({base, *(TrainingData(config).fingerprint for config in others)}) == 4
    assert TrainingData(reopened(folder, confine_attention=True, shard_tokens=5000)).fingerprint == base


def test_summary_accounts_for_every_token(folder: Path) -> None:
    config = reopened(folder)
    summary = TrainingData(config).summary(1000)
    assert [entry.name for entry in summary] == ["main", "second"]
    for entry in summary:
        tokens, _ = everything(Path(config.dir) / "train" / entry.name)
        assert entry.tokens == len(tokens)
    assert summary[1].share == pytest.approx(0.3)
    assert summary[1].taken == [300] and summary[1].epochs == pytest.approx(300 / summary[1].windows)


def test_source_shorter_than_a_window(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train/main holds \d+ tokens, but one window takes .* = 100001"):
        TrainingData(reopened(folder, sequence_tokens=100_000))


@pytest.mark.parametrize("name", ["held", "few"])
@pytest.mark.parametrize(("world_size", "batch_samples"), [(1, 1), (1, 7), (3, 4), (8, 50)])
@pytest.mark.parametrize("limit", [None, 5])
def test_validation_is_equal_on_every_rank(
    folder: Path, name: str, world_size: int, batch_samples: int, limit: int | None
) -> None:
    config = reopened(folder, confine_attention=True, restart_positions=True)
    held = ValidationSet(config, name)
    tokens, _ = everything(Path(config.dir) / "validation" / name)
    batches = [list(held.batches(rank, world_size, batch_samples, limit)) for rank in range(world_size)]
    assert len({len(mine) for mine in batches}) == 1 and len(batches[0]) >= 1
    samples = held.samples if limit is None else min(limit, held.samples)
    ids = [number for mine in batches for batch in mine for number in batch.sample_ids.tolist()]
    assert sorted(number for number in ids if number >= 0) == [
        place * held.samples // samples for place in range(samples)
    ]
    for batch in (batch for mine in batches for batch in mine):
        assert batch.tokens.shape == (batch_samples, config.sequence_tokens)
        padding = batch.sample_ids == -1
        assert (batch.targets[padding] == -100).all() and (batch.tokens[padding] == 0).all()
        for row, number in enumerate(batch.sample_ids.tolist()):
            if number >= 0:
                first = number * config.sequence_tokens
                assert batch.tokens[row].tolist() == tokens[first : first + config.sequence_tokens].tolist()
    again = list(ValidationSet(config, name).batches(0, world_size, batch_samples, limit))
    assert all(_equal(one, two) for one, two in zip(batches[0], again, strict=True))


def _equal(one: Batch, two: Batch) -> bool:
    pairs = [(getattr(one, field), getattr(two, field)) for field in one.__dataclass_fields__]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_a_target_that_the_data_ignores_is_one_that_the_model_ignores() -> None:
    assert batches.IGNORE_INDEX == chunks.IGNORE_INDEX
