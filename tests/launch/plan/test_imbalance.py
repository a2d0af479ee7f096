"""The simulation of ranks that wait for the busiest, against what is known of normal numbers; and docs/speed.md."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch.plan import imbalance
from launch.plan.imbalance import Spread, Waiting, capacity_slowdown, sentence, simulate, slowdowns, table
from launch.plan.workload import read_workload
from tests.launching import ROOT

CONFIG = str(Path(__file__).parent / "large.yaml")


def largest(ranks: int) -> float:
    """Expected largest of so many standard normal numbers, by integration."""
    x = np.linspace(-8, 8, 20_001)
    below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    return float(8 - (x[1] - x[0]) * (below**ranks).sum())


@pytest.mark.parametrize(("ranks", "micro_batch", "accumulation"), [(64, 1, 1), (1024, 4, 1), (64, 2, 2)])
def test_who_is_waited_for_is_the_largest_of_normal_numbers(ranks: int, micro_batch: int, accumulation: int) -> None:
    expected = 0.5 + 0.02 * largest(ranks) / math.sqrt(micro_batch * accumulation)
    at_once = 0.5 + 0.02 * largest(ranks) / math.sqrt(micro_batch)
    alike = simulate(Spread(0.0, 0.02), 0.5, 4, ranks, micro_batch, accumulation)  # all sites of a window
    assert alike.once == pytest.approx(expected, abs=1e-3)
    assert alike.every_layer == pytest.approx(at_once, abs=1e-3)
    apart = simulate(Spread(0.02, 0.0), 0.5, 32, ranks, micro_batch, accumulation)  # sites that make up for each other
    assert apart.once == pytest.approx(0.5, abs=1e-3)
    own = 0.02 * math.sqrt(1 - 1 / 32)
    assert apart.every_layer == pytest.approx(0.5 + own * largest(ranks) / math.sqrt(micro_batch), abs=1e-3)


def test_nobody_waits_where_nothing_varies_or_nobody_else_is() -> None:
    assert simulate(Spread(0.0, 0.0), 0.5, 4, 64, 2) == Waiting(0.5, 0.5)
    alone = simulate(Spread(), 0.5, 24, 1, 4)
    assert alone.once == pytest.approx(alone.every_layer) == pytest.approx(0.5, abs=1e-3)
    workload = read_workload(CONFIG)
    assert slowdowns(workload, Spread(0.0, 0.0), 64, 1) == Waiting(1.0, 1.0)
    assert sentence(workload, 1) == "" == sentence(read_workload(CONFIG, ["model.router.execution=capacity"]), 64)
    assert "waiting     " in sentence(workload, 64) and "at ZeRO 3" in sentence(workload, 64)


def test_ranks_that_share_windows_have_unlike_shares_of_a_capacity() -> None:
    capacity, shared = "model.router.execution=capacity", "deepspeed.sequence_parallel=2"
    workload = read_workload(CONFIG, [capacity, shared])
    assert workload.computed_share == workload.density < read_workload(CONFIG, [capacity]).computed_share
    assert "is not estimated where ranks share windows" in sentence(workload, 64)
    assert sentence(read_workload(CONFIG, ["model.router.execution=reference", shared]), 64) == ""


def test_a_capacity_is_the_work_of_its_tokens() -> None:
    """640 of 2,048 x 0.5 tokens and a quarter more, in whole blocks: 1,280 of 2,048, at every site."""
    workload = read_workload(CONFIG)
    assert capacity_slowdown(workload) == pytest.approx(1 + 0.125 * (slowdowns_at(1.0) - slowdowns_at(0.0)))


def slowdowns_at(density: float) -> float:
    """Forward FLOPs at a density, over those at the config's 0.5, counted by hand: 24 layers of width 2,048."""
    d, kv, ffn, vocabulary, keys = 2048, 512, 5632, 32000, 2049 / 2
    always = d * vocabulary + 24 * (2 * d * kv + 2 * d)
    skippable = 24 * (2 * d * d + 2 * d * keys + 3 * d * ffn)
    return (always + density * skippable) / (always + 0.5 * skippable)


def test_the_docs_have_the_table_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["imbalance", CONFIG])
    assert imbalance.main() == 0
    printed = capsys.readouterr().out.strip().split("\n\n", 1)[1]
    assert printed == table(read_workload(CONFIG), Spread(), [64, 1024], [1, 4, 16])
    assert printed in (ROOT / "docs/speed.md").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--site-spread", "0.5"], "--site-spread is a standard deviation of densities, from 0 to below 0.5, got 0.5"),
        (["--mean-spread", "-1"], "--mean-spread is a standard deviation of densities, from 0 to below 0.5, got -1"),
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--micro-batches", "4", "0"], "--micro-batches must be at least 1, got 0"),
        ([], "has no router, so all ranks do the same; give a config that has one"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    dense = yaml.safe_load(Path(CONFIG).read_text())
    del dense["model"]["router"]
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(dense))
    monkeypatch.setattr(sys, "argv", ["imbalance", str(tmp_path / "dense.yaml"), *words])
    with pytest.raises(SystemExit) as end:
        imbalance.main()
    assert sentence in str(end.value.code) + capsys.readouterr().err
