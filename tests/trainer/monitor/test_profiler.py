"""A trace of some steps: phases and sites as ranges, nothing left behind, the same losses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config import PretrainConfig


def _ranges(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("cat") == "user_annotation"]


def _inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    return bool(outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"])


def test_a_trace_has_our_phases_and_sites_and_changes_no_loss(
    tiny: dict[str, Any], train_here: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train_here(tiny, f"train.run_dir={tmp_path / 'plain'}") == 0
    assert train_here(tiny, "train.profile.steps=[2,3]", "train.profile.memory=true") == 0
    run = Path(tiny["train"]["run_dir"])
    plain, profiled = (
        [json.loads(line).get("train/loss") for line in (folder / "metrics.jsonl").open()]
        for folder in (tmp_path / "plain", run)
    )
    assert plain == profiled
    out = capsys.readouterr().out
    trace = run / "profile/rank-0.pt.trace.json.gz"
    assert f"profile of steps 2 to 3 written to {trace}; for a summary: python -m launch.profile {run}" in out
    assert "train.profile.memory: a snapshot is of a GPU's allocator, and this run is on a CPU" in out
    ranges = _ranges(trace)
    count = {name: sum(r["name"] == name for r in ranges) for name in {r["name"] for r in ranges}}
    assert (count["step"], count["backward"], count["optimiser"], count["tracker"]) == (2, 8, 8, 2)
    assert count["save"] == count["evaluate"] == 1 and count["data"] >= 2
    steps = [r for r in ranges if r["name"] == "step"]
    for name in (
        "forward",
        "layer-00",
        "layer-02 attention",
        "layer-01 ffn",
        "layer-00 router",
        "embedding",
        "head and loss",
    ):
        of_steps = [r for r in ranges if r["name"] == name and any(_inside(r, step) for step in steps)]
        assert len(of_steps) == 8, name
    attention = next(r for r in ranges if r["name"] == "layer-01 attention")
    assert any(r["name"] == "layer-01" and _inside(attention, r) for r in ranges)


def test_steps_must_be_in_order(configure: Callable[..., PretrainConfig]) -> None:
    with pytest.raises(ValueError, match=r"the first and the last to profile, got 5 and 2; swap them"):
        configure("train.profile.steps=[5,2]")
