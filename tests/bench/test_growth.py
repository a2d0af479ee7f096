"""The growth benchmark at toy size: a row for every pair and density, and what does not fit is reported, not hidden."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import growth
from bench.common import memory
from bench.common.contestants import Ours
from bench.common.report import Row
from bench.common.timing import Spread
from bench.growth import Pair
from tests.bench.toy import MODEL, RUN, refused, rows_of
from trainer.monitor.peak_flops import PeakFlops

TOY = [*RUN, *MODEL, "--densities", "1", "0.25", "--pairs"]
NAMES = ["dense", "routed_1", "routed_0.25"]


def test_rows_and_table_cover_every_pair(tmp_path: Path) -> None:
    table = tmp_path / "growth.md"
    rows = rows_of(growth.main, [*TOY, "32x2", "96x1", "--markdown", str(table)], tmp_path / "growth.json", "step_s")
    assert list(rows) == [f"{pair}/{name}" for pair in ("32x2", "96x1") for name in NAMES]
    for name, row in rows.items():
        assert row["tokens"] == (64 if name.startswith("32x2/") else 96)
        assert None not in row.values()
    for pair in ("32x2", "96x1"):
        assert rows[f"{pair}/routed_1"]["flop_bound_ratio"] > 1.0 > rows[f"{pair}/routed_0.25"]["flop_bound_ratio"]
        assert rows[f"{pair}/routed_0.25"]["peak_memory_bytes"] < rows[f"{pair}/routed_1"]["peak_memory_bytes"]
    text = table.read_text()
    assert "matmul peak" in text and "layers=2 width=64" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and {line.count("|") for line in lines} == {5}
    row = rows["96x1/routed_0.25"]
    assert lines[3].startswith("| 96 x 1 | ")
    assert f"| {row['ratio_to_dense']:.3f} ({row['flop_bound_ratio']:.3f}) |" in lines[3]


def _fails_above(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Steps on more than ``tokens`` a sample run out of memory half-way, as torch reports it."""
    step = Ours.step

    def limited(ours: Ours) -> float:
        if ours.tokens.shape[1] > tokens:
            ours.loss().backward()
            with memory.held_to_free_memory(torch.device("cpu")):
                torch.empty(2**46, dtype=torch.uint8)
        return step(ours)

    monkeypatch.setattr(Ours, "step", limited)


def test_a_pair_that_does_not_fit_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails_above(monkeypatch, 40)
    table = tmp_path / "growth.md"
    pairs = ["64x1", "32x1"]
    rows = rows_of(growth.main, [*TOY, *pairs, "--markdown", str(table)], tmp_path / "growth.json", "step_s")
    assert list(rows) == [f"32x1/{name}" for name in NAMES]
    told = capsys.readouterr().out
    assert "64x1: left out, it does not fit into the memory of cpu (can't allocate memory: you tried to" in told
    assert "| 64 x 1 | does not fit into memory |  |  |" in told and "| 64 x 1 |" in table.read_text()


def test_what_failed_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    _fails_above(monkeypatch, 40)
    options = growth.parse([*TOY, "64x1"])
    contestants = growth.build(options)
    fastest = PeakFlops(torch.device("cpu"), torch.float32)
    assert isinstance(growth.measure_pair(options.pairs[0], contestants, fastest, options), str)
    gc.collect()
    assert all(p.grad is None for c in contestants.values() for p in c.model.parameters())


def test_other_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Ours) -> float:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Ours, "step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        growth.main([*TOY, "32x1"])


def test_no_pair_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _fails_above(monkeypatch, 8)
    with pytest.raises(SystemExit) as exit_info:
        growth.main([*TOY, "64x1", "32x1"])
    assert exit_info.value.code == 1
    assert "none of --pairs 64x1 32x1 fits into memory" in capsys.readouterr().err


def test_the_table_of_made_up_numbers() -> None:
    def row(name: str, ratio: float, bound: float) -> Row:
        return Row(name, 1.0, "cpu", "fp32", 64, 1.5, Spread(0.0, ratio, 9.0), bound, 0.5, 1)

    rows: list[Any] = [row("32x2/dense", 1.0, 1.0), row("32x2/routed_0.5", 0.6, 0.55)]
    table = growth.ratio_table({Pair(32, 2): rows, Pair(64, 2): None}, [0.5])
    assert table.splitlines() == [
        "| tokens x samples | dense step, s | density 0.5 |",
        "| --- | --- | --- |",
        "| 32 x 2 | 1.500 | 0.600 (0.550) |",
        "| 64 x 2 | does not fit into memory |  |",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["512"], "at least 2x1, for example 512x4; got '512'"),
        (["1x4"], "at least 2x1, for example 512x4; got '1x4'"),
        (["32x0"], "at least 2x1, for example 512x4; got '32x0'"),
        (["32x1", "32x1"], "--pairs must differ from each other, got 32x1 32x1"),
        (["32x1", "--densities"], "--densities needs at least one density to compare with dense"),
        (["32x1", "--densities", "1.5"], "--densities must lie above 0 and not above 1, got 1.5"),
        (["32x1", "--heads", "3"], "must be divisible by"),
        (["32x1", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["32x1", "--device", "tpu"], "--device must be cpu or cuda"),
        (["32x1", "--json", "no/such/folder/growth.json"], "--json"),
        (["32x1", "--markdown", "no/such/folder/growth.md"], "--markdown"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(growth.main, [*TOY, *arguments], capsys)
