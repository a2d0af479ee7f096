"""Runs whose ranks share windows: the same figures at any number of ranks and of those that share, and on from any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks

Config = dict[str, Any]
STEPS = 4


def _train(path: str, folder: Path, ranks: int, *overrides: str) -> str:
    with Ranks(path, f"train.run_dir={folder}", *overrides, count=ranks) as running:
        assert running.end() == [0] * ranks, running.output[-4000:]
        return running.output


def _figures(folder: Path) -> dict[str, float]:
    """What was logged but for the clock's, the machine's and the memory's figures, by step."""
    found = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in line.items():
            if isinstance(value, int | float) and not name.startswith(("speed/", "memory/", "time")):
                found[f"{line['step']} {name}"] = value
    return found


@pytest.fixture
def path(tiny: Config, write_config: Callable[..., str]) -> str:
    """A run of windows of documents, with exploration, evaluated with noise, too."""
    tiny["model"]["router"] |= {"explore": 0.2}
    tiny["data"]["confine_attention"] = tiny["data"]["restart_positions"] = True
    tiny["train"]["evaluation"] |= {"with_noise": True}
    tiny["train"]["log"]["images"] = True
    tiny["deepspeed"]["persistence_threshold"] = 0  # at stage 3 everything is parted
    return write_config(tiny)


def test_a_run_goes_on_at_any_number_of_ranks_that_share(path: str, tmp_path: Path) -> None:
    """Two steps of two groups of two at ZeRO 1, one of one group of four at ZeRO 3, one of a single rank."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _train(path, whole, 1, "deepspeed.zero_stage=0")
    resume = "train.checkpoint.resume=auto"
    first = _train(path, parts, 4, "deepspeed.zero_stage=1", "deepspeed.sequence_parallel=2", "train.stop_at_step=2")
    assert "2 micro-batches of 2 samples a step and group of 2 ranks" in first
    stage = ("deepspeed.zero_stage=3", "train.stop_at_step=3", resume)
    then = _train(path, parts, 4, "deepspeed.sequence_parallel=4", *stage)
    assert "ranks that share a window 2 there and 4 here" in then
    _train(path, parts, 1, "deepspeed.zero_stage=2", resume)
    expected, found = _figures(whole), _figures(parts)
    assert expected.keys() == found.keys() - {name for name in found if name.startswith("3 validation/")}
    assert f"{STEPS} validation/code/loss" in expected and "1 train/loss" in expected
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


@pytest.mark.parametrize("capacity", [False, True], ids=["quantile", "capacity"])
def test_a_capacity_and_thresholds_are_of_whole_windows(path: str, tmp_path: Path, capacity: bool) -> None:
    more = ["model.router.execution=capacity"] if capacity else ["model.router.budget.controller=quantile"]
    more += ["train.stop_at_step=3", "train.evaluation.every_steps=4", "train.log.images=false"]
    folders = [tmp_path / "whole", tmp_path / "shared"]
    _train(path, folders[0], 1, "deepspeed.zero_stage=1", *more)
    _train(path, folders[1], 2, "deepspeed.zero_stage=3", "deepspeed.sequence_parallel=2", *more)
    expected, found = map(_figures, folders)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


def test_ranks_that_do_not_divide_are_told(path: str, tmp_path: Path) -> None:
    with Ranks(path, f"train.run_dir={tmp_path / 'run'}", "deepspeed.sequence_parallel=2", count=3) as ranks:
        assert "deepspeed.sequence_parallel (2) must divide the number of ranks (3), because" in ranks.error()
