"""Losses and shares of a mixture's sources, and what a border between its stages leaves in lines and log."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batches import TrainingData
from data.config import DataConfig
from tests.logged import OF_TIME, lines_of, steps_of
from tests.trainer.monitor.metric_lines import Train, in_stages


def test_losses_of_the_sources_add_up_to_the_loss(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train
) -> None:
    """Exactly: the same sums in fp64, in another order. Shares are those of the samples drawn, in the log's steps."""
    tiny["data"], tiny["train"]["log"]["every_steps"] = mixed, 2
    assert train_here(tiny) == 0
    sources = TrainingData(DataConfig.model_validate(mixed)).batch(range(32)).sources
    assert sources is not None
    samples = sources.numpy()
    for step, line in steps_of(tiny["train"]["run_dir"]).items():
        shares = {name: line[f"train/share/{name}"] for name in ("code", "few")}
        few = (samples[8 * step - 16 : 8 * step] == 1).mean()
        assert 0 < few < 0.5 and shares == {"code": 1 - few, "few": few}
        losses = {name: line[f"train/loss/{name}"] for name in shares}
        assert abs(losses["code"] - losses["few"]) > 1e-3
        assert sum(shares[n] * losses[n] for n in shares) == pytest.approx(line["train/loss"], rel=1e-14)


def test_a_source_without_samples_in_a_line_has_no_loss(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train
) -> None:
    mixed["sources"][1]["weight"] = 0.004  # of the 8 samples none is its own
    tiny["data"] = mixed
    assert train_here(tiny, "train.steps=1") == 0
    line = steps_of(tiny["train"]["run_dir"])[1]
    assert line["train/loss/few"] is None and line["train/share/few"] == 0
    assert line["train/loss/code"] == pytest.approx(line["train/loss"], rel=1e-14)


def test_a_border_is_marked_and_crossed_by_a_resume_bit_by_bit(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 has samples 16 to 23, of which 20 is the first of the second stage; the log says so once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tiny["train"]["run_dir"]
    tiny["data"] = in_stages(mixed)
    told = "step      3  data.stages: end begins with sample 20: few 100%"
    assert train_here(tiny, f"train.run_dir={run_dir}-straight", "train.log.every_steps=2") == 0
    out = capsys.readouterr().out
    assert out.count("data.stages: ") == 1 and told in out
    assert "stage     main from token 0 on: code " in out and "stage     end from token 640 on: few 384 tokens (" in out

    assert train_here(tiny, "train.log.every_steps=2") == 0
    shutil.rmtree(Path(run_dir) / "checkpoints/step-00000004")
    capsys.readouterr()
    assert train_here(tiny, "train.log.every_steps=2", "train.checkpoint.resume=required") == 0
    assert capsys.readouterr().out.count(told) == 1
    one, other = (
        [{k: v for k, v in line.items() if not k.startswith(OF_TIME)} for line in lines_of(folder)]
        for folder in (f"{run_dir}-straight", run_dir)
    )
    assert one == other
    assert {line["step"]: line["data/stage"] for line in one if "data/stage" in line} == {2: 0, 3: 1, 4: 1}
    last = one[-1]
    assert last["train/share/code"] == pytest.approx(1 - last["train/share/few"]) and last["train/share/few"] > 0.75
    events = EventAccumulator(str(Path(run_dir) / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["data/stages/text_summary"]
    assert {event.step for event in events.Tensors("data/stages/text_summary")} == {3}


def test_a_source_that_is_absent_from_a_stage_has_no_loss(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train
) -> None:
    tiny["data"] = in_stages(mixed)
    assert train_here(tiny) == 0
    line = steps_of(tiny["train"]["run_dir"])[4]
    assert line["train/loss/code"] is None and line["train/share/code"] == 0
    assert line["train/loss/few"] == pytest.approx(line["train/loss"], rel=1e-14)


def test_a_border_is_no_spike(tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train) -> None:
    """Where a stage begins losses may be others, so what was normal before it is forgotten."""
    tiny["data"] = in_stages(mixed)
    assert train_here(tiny) == 0
    state = torch.load(Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000004/trainer.pt", weights_only=True)
    losses = [line["train/loss"] for line in steps_of(tiny["train"]["run_dir"]).values()]
    assert state["spikes"]["losses"] == pytest.approx(losses[2:], rel=1e-12)
