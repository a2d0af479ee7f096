"""How fast data is prepared is measured on real preparations, which must agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.preparation import main


def test_workers_and_tasks_are_measured(
    tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    (tmp_path / "disk").mkdir()
    options = ["--workers", "1", "--tasks", "2", "--disk", str(tmp_path / "disk"), "--out", str(out)]
    assert main([write_config(tiny), "data.part_bytes=50000", *options]) == 0
    figures, said = json.loads(out.read_text()), capsys.readouterr().out
    rows = ["reading, 1 process", "preparing, 1 worker", "preparing, 2 tasks of 1 worker"]
    assert list(figures["seconds"]) == rows and all(seconds > 0 for seconds in figures["seconds"].values())
    assert figures["parts"] == 3 and figures["text_bytes"] > 100_000 and all(row in said for row in rows)
    assert said.endswith("all left the same bytes\n") and not list((tmp_path / "disk").iterdir())


def test_a_preparation_that_fails_is_told(
    tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["data"]["sources"][0] |= {"format": "json"}
    with pytest.raises(SystemExit):
        main([write_config(tiny), "--workers", "", "--tasks", "1", "--disk", str(tmp_path)])
    assert "error: data.prepare failed: error: source 'code': cannot read" in capsys.readouterr().err
