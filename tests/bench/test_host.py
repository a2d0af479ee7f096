"""The host's time a layer is measured on real engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launching import run


def test_both_stages_are_measured(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    done = run("bench.host", write_config(tiny), "train.stop_at_step=1", "--rounds", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:]
    figures = json.loads(out.read_text())
    assert list(figures) == ["zero_1", "zero_1_recomputed", "zero_3", "zero_3_recomputed"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in figures.values())
    assert "ZeRO 3, activations recomputed" in done.stdout
