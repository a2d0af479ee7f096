"""Curves are drawn from a run's own metrics, and a folder that is no run is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.curves import draw


def _run(folder: Path, densities: list[float]) -> Path:
    folder.mkdir()
    lines = [{"step": s, "train/loss": 5.0 - s, "budget/target": 0.5} for s in range(1, 4)]
    for step, density in enumerate(densities):
        line = {"step": step, "validation/books/loss": 4.0 - step, "validation/books/density": density}
        lines.append(line | {"validation/books/density/layer-00": density})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_both_panels_hold_what_was_logged(tmp_path: Path) -> None:
    losses, densities = draw([_run(tmp_path / "a", [0.9, 0.6, 0.5]), _run(tmp_path / "b", [0.8, 0.7])]).axes[:2]
    validation = [list(line.get_ydata()) for line in losses.lines if line.get_color() == "black"]
    assert validation == [[4.0, 3.0, 2.0], [4.0, 3.0]]
    means = [list(line.get_ydata()) for line in densities.lines if str(line.get_label()) in "ab"]
    assert means == [[0.9, 0.6, 0.5], [0.8, 0.7]]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: it has no metrics.jsonl"):
        draw([tmp_path])
