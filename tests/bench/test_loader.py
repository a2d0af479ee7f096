"""The loader benchmark at toy size: its data are the project's own, and waiting is seen where there is some."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import loader
from bench.common.contestants import Ours
from data.batches import Batch, TrainingData
from data.store import TokenStore, train_folder
from tests.bench.toy import BATCH, MODEL, RUN, refused, rows_of

TOY = [*RUN, *MODEL, *BATCH, "--steps=4", "--data-tokens=5000"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rows_of(loader.main, TOY, tmp_path_factory.mktemp("bench") / "loader.json", "step_s")


def test_rows(rows: dict[str, Any]) -> None:
    assert list(rows) == ["dense", "from_loader", "loader"]
    assert {row["tokens"] for row in rows.values()} == {64}
    assert None not in rows["dense"].values()
    assert [key for key, value in rows["from_loader"].items() if value is None] == ["peak_memory_bytes"]
    senseless = ["density", "flop_bound_ratio", "mfu_executed", "peak_memory_bytes"]
    assert [key for key, value in rows["loader"].items() if value is None] == senseless
    assert rows["loader"]["ratio_to_dense"] < 1.0


@pytest.mark.parametrize("vocab", [128, 70_000])
def test_shards_are_whole_and_hold_what_was_asked_for(tmp_path: Path, vocab: int) -> None:
    config = loader.write_shards(tmp_path, vocab, tokens=2_500_000, sequence_tokens=32)
    data = TrainingData(config)
    assert data.vocab_size == vocab
    large, small = data.summary(1000)
    assert large.tokens >= 0.75 * 2_500_000 and small.tokens >= 0.25 * 2_500_000
    assert large.share == small.share == 0.5
    batch = next(loader.step_batches(data, 3, 8))
    assert batch.tokens.shape == (8, 32) and int(batch.tokens.max()) < vocab
    assert batch.sample_ids.tolist() == list(range(24, 32))
    end = TokenStore(train_folder(config, "large")).manifest.eos_id
    ends = (data.batch(range(2000)).tokens == end).float().mean()
    assert 1 / 1000 < float(ends) - 1 / vocab < 1 / 500  # documents of about 700 tokens
    assert len(np.unique(batch.tokens)) > 30


def test_a_slow_loader_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fast = loader.step_batches

    def slow(data: TrainingData, first_step: int, samples: int) -> Iterator[Batch]:
        for batch in fast(data, first_step, samples):
            time.sleep(0.3)
            yield batch

    monkeypatch.setattr(loader, "step_batches", slow)
    with pytest.raises(SystemExit) as exit_info:
        loader.main([*TOY, "--repeats=1", "--steps=1", "--check"])
    assert exit_info.value.code == 1
    out, err = capsys.readouterr()
    assert "1 of 1 limits missed: loader/waited_share is 0." in err
    share = float(out.split("waited for data: ")[1].split("%")[0])
    assert share > 50  # a step takes a few milliseconds


def test_a_fast_loader_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps so long that the next batch is there before they end, on busy cores too."""
    quick = Ours.step

    def long_step(ours: Ours) -> float:
        time.sleep(0.5)
        return quick(ours)

    monkeypatch.setattr(Ours, "step", long_step)
    loader.main([*TOY, "--repeats=3", "--steps=1", "--check"])
    assert "ok     loader/waited_share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--data-tokens", "0"], "--data-tokens must be at least 1, got 0"),
        (["--vocab", "2"], "--vocab must be at least 3, got 2"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--heads", "3"], "must be divisible by"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--json", "no/such/folder/loader.json"], "--json"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(loader.main, [*TOY, *arguments], capsys)


def test_too_little_data_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(loader.main, [*TOY, "--tokens", "2000000"], capsys)
    assert "one window takes data.sequence_tokens + 1 = 2000001" in err
