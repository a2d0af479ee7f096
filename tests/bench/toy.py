"""Toy sizes that the tests of ``bench/`` share, and what every benchmark's JSON rows must look like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = ["--device=cpu", "--repeats=2"]
MODEL = ["--layers=2", "--width=64", "--heads=4", "--kv-heads=2", "--ffn-width=96", "--vocab=128"]
BATCH = ["--tokens=32", "--samples=2"]


def keys(seconds_name: str) -> list[str]:
    """The promised keys of a row, in order."""
    return [
        "name",
        "density",
        "device",
        "dtype",
        "tokens",
        seconds_name,
        "ratio_to_dense",
        "flop_bound_ratio",
        "mfu_executed",
        "peak_memory_bytes",
    ]


def rows_of(main: Callable[[list[str]], None], arguments: list[str], path: Path, seconds_name: str) -> dict[str, Any]:
    """Run a benchmark and read its rows by name; each has the promised keys, and only positive finite figures."""
    main([*arguments, "--json", str(path)])
    rows = json.loads(path.read_text())
    for row in rows:
        assert list(row) == keys(seconds_name)
        assert (row["device"], row["dtype"]) == ("cpu", "fp32")
        figures = [row[key] for key in keys(seconds_name)[4:] if row[key] is not None]
        assert all(figure > 0 and math.isfinite(figure) for figure in figures), row
        assert row[seconds_name] is not None and row["ratio_to_dense"] is not None
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


def refused(main: Callable[[list[str]], None], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a benchmark ends, with status 1 and before it has measured anything."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err
