"""A trace of some steps: phases and sites as ranges, nothing left behind, the same losses."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.decoder import Decoder
from tests.trainer.one_rank import engine_for, take_steps
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.heartbeat import Heartbeat
from trainer.monitor.profiler import StepProfiler


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
    assert "train.profile.memory: a snapshot shows a GPU's allocator, but this run is on a CPU" in out
    ranges = _ranges(trace)
    count = {name: sum(r["name"] == name for r in ranges) for name in {r["name"] for r in ranges}}
    assert (count["step"], count["backward"], count["optimiser"], count["tracker"]) == (2, 8, 8, 2)
    assert count["save"] == count["evaluate"] == 1 and count["data"] >= 2
    steps = [r for r in ranges if r["name"] == "step"]
    expected = dict.fromkeys(
        ("forward", "layer-00", "layer-01 ffn", "layer-00 router", "embedding", "head and loss"), 8
    )
    for name, times in (expected | {"layer-02 attention": 16}).items():  # keys and values first, for all tokens
        of_steps = [r for r in ranges if r["name"] == name and any(_inside(r, step) for step in steps)]
        assert len(of_steps) == times, name
    attention = next(r for r in ranges if r["name"] == "layer-01 attention")
    assert any(r["name"] == "layer-01" and _inside(attention, r) for r in ranges)


def test_steps_must_be_in_order(configure: Callable[..., PretrainConfig]) -> None:
    with pytest.raises(ValueError, match=r"the first and the last to profile, got 5 and 2; swap them"):
        configure("train.profile.steps=[5,2]")


class _Tracking:
    def log_step(self) -> None:
        """Nothing."""


def _traces_of(engine: Any, heartbeat: Any, tracking: Any) -> list[int]:
    """How much is hooked onto or put around what a profiler touches."""
    modules = list(engine.module.modules())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (engine, *modules)]
    put = [len({"backward", "step", "note", "log_step", "keys_values"} & vars(o).keys()) for o in (engine, *modules)]
    return [*hooks, *put, *(len({"note", "log_step"} & vars(o).keys()) for o in (heartbeat, tracking))]


def test_nothing_is_left_behind_and_another_thread_may_note_a_phase(
    configure: Callable[..., PretrainConfig], world: World, tmp_path: Path
) -> None:
    config = configure("train.profile.steps=[1,1]")
    heartbeat, tracking = Heartbeat(tmp_path / "heartbeat", 0), _Tracking()
    assert config.train.profile is not None
    profiler = StepProfiler(config.train.profile, tmp_path, 0, world.device)
    with engine_for(config, world) as engine:
        before = _traces_of(engine, heartbeat, tracking)
        profiler.between_steps(0, engine, heartbeat, tracking)
        assert _traces_of(engine, heartbeat, tracking) != before
        heartbeat.note(0, "training")
        take_steps(engine, config, world, 1)
        watchdog = threading.Thread(target=heartbeat.note, args=(0, "stalled"))
        watchdog.start()
        watchdog.join()
        assert heartbeat.phase == "stalled"
        profiler.between_steps(1, engine, heartbeat, tracking)
        assert _traces_of(engine, heartbeat, tracking) == before
        profiler.close()
    assert {"step", "layer-00 attention"} <= {r["name"] for r in _ranges(tmp_path / "profile/rank-0.pt.trace.json.gz")}


def test_a_compiled_layer_has_one_range(
    tiny: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled to what it was: inductor is not the subject."""

    def compile_layers(self: Decoder) -> None:
        for layer in self.layers:
            layer._compiled_call_impl = layer._call_impl

    monkeypatch.setattr(Decoder, "compile_layers", compile_layers)
    assert train_here(tiny, "train.profile.steps=[2,2]", "train.compile=true", "train.steps=2") == 0
    names = {r["name"] for r in _ranges(Path(tiny["train"]["run_dir"]) / "profile/rank-0.pt.trace.json.gz")}
    assert {"layer-00", "layer-02", "head and loss"} <= names and "layer-00 attention" not in names


def test_a_trace_that_cannot_be_written_ends_no_run(
    tiny: dict[str, Any], train_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(tiny["train"]["run_dir"])
    run.mkdir()
    (run / "profile").write_text("in the way")
    assert train_here(tiny, "train.profile.steps=[2,9]", "train.steps=2") == 0  # and one that ends before it is full
    assert "rank-0.pt.trace.json.gz cannot be written (" in capsys.readouterr().out
