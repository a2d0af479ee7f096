"""What a checkpoint costs is measured on real saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launching import run


def test_both_ways_are_measured(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "saving.json"
    options = ["--steps", "2", "--rounds", "2", "--disk", str(tmp_path), "--out", str(out)]
    done = run("bench.saving", write_config(tiny), "train.stop_at_step=1", *options)  # of the run, not of this
    assert done.returncode == 0, done.stdout[-2000:]
    figures = json.loads(out.read_text())
    costs = figures["cost_in_steps"]
    assert figures["checkpoint_bytes"] > 400_000 and all(len(rounds) == 2 for rounds in costs.values())
    assert all(copying > 0 for copying in costs["copying"])
    assert "written while training goes on" in done.stdout
    assert not list(tmp_path.glob("tmp*"))
