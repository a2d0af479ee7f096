"""The distillation benchmark at toy size: a row a case, and chunks hold less than full logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.distillation import Case, main


def test_a_row_for_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vocab", "400", "--width", "8", "--repeats", "1", "--layers", "2", "4", "--tokens", "64", "2048"]
    assert main([*sizes, "--markdown", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text == capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["2", "64"], ["2", "2,048"], ["4", "64"], ["4", "2,048"]]
    assert all(float(cell) > 0 for row in rows for cell in row[5:])


def test_both_ways_have_the_same_gradients() -> None:
    found = []
    for way in ("chunked", "full"):
        case = Case(3, 40, 90, 8)
        case.forget = lambda: None  # type: ignore[method-assign]
        getattr(case, way)()
        found.append([state.grad for state in case.states])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and one.allclose(other, rtol=1e-4, atol=1e-5)


def test_sizes_must_be_possible(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--layers", "1"])
    assert "--layers must be at least 2" in capsys.readouterr().err
