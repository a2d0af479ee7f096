"""Rows carry the promised keys, the table and header say what was measured, and the check reports its verdicts."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.common.report import Result, Row, tell
from bench.common.timing import Spread
from tests.bench.toy import keys

ROW = Row("routed_0.5", 0.493, "cpu", "fp32", 2048, 1.25, Spread(0.57, 0.58, 0.6), 0.55, 0.68, 3 * 2**29)
EMPTY = replace(ROW, name="loader", density=None, to_dense=None, flop_bound_ratio=None, mfu_executed=None)
RESULT = Result(
    [ROW, replace(EMPTY, peak_memory_bytes=None)], 2.2e11, {"step/routed_1": 1.0}, ["a note"], ["a finding"]
)


def _options(**changes: object) -> argparse.Namespace:
    fields = {"device": "cpu", "dtype": "fp32", "repeats": 3, "check": False, "json": None, "layers": 12}
    return argparse.Namespace(**{**fields, "other_sizes": [], "batches": [1, 8], **changes})


def test_json_has_the_promised_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    tell(_options(json=path), RESULT, ["layers"], "token_s")
    full, empty = json.loads(path.read_text())
    assert list(full) == list(empty) == keys("token_s")
    assert list(full.values()) == ["routed_0.5", 0.493, "cpu", "fp32", 2048, 1.25, 0.58, 0.55, 0.68, 3 * 2**29]
    assert list(empty.values()) == ["loader", None, "cpu", "fp32", 2048, 1.25, None, None, None, None]


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tell(_options(), RESULT, ["layers", "batches"], "step_s")
    place, sizes, note, columns, full, empty, finding = capsys.readouterr().out.splitlines()
    assert "CPU" in place and "matmul peak 220 GFLOP/s" in place
    assert sizes == "layers=12 batches=1,8, 3 rounds"
    assert (note, finding) == ("a note", "a finding")
    assert columns.split()[:2] == ["density", "step_s"]
    assert full.split() == [
        "routed_0.5",
        "0.493",
        "1.250000",
        "0.580",
        "(0.570",
        "-",
        "0.600)",
        "0.550",
        "68.0%",
        "1.50",
    ]
    assert empty.split() == ["loader", "-", "1.250000", "-", "-", "-", "-"]
    assert len(full) == len(empty) == len(columns)


def test_the_check_passes_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    tell(_options(check=True), RESULT, [], "step_s")
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok     step/routed_1 ")


def test_the_check_fails_after_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    slow = replace(RESULT, measured={"step/routed_1": 2.0})
    with pytest.raises(ValueError, match=r"1 of 1 limits missed: step/routed_1 is 2 \(at most"):
        tell(_options(check=True, json=path), slow, [], "step_s")
    assert path.exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("MISSED step/routed_1 ")
    tell(_options(check=False), slow, [], "step_s")


def test_other_sizes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    tell(_options(check=True, other_sizes=["layers", "dtype"]), RESULT, [], "step_s")
    assert "default sizes; these differ: layers=12, dtype=fp32" in capsys.readouterr().out


def test_noise_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    wide = replace(ROW, name="wide", to_dense=Spread(0.4, 0.5, 0.7))
    tell(_options(), replace(RESULT, rows=[*RESULT.rows, wide]), [], "step_s")
    assert capsys.readouterr().out.splitlines()[-1].endswith("repeat on a quieter machine: wide")
