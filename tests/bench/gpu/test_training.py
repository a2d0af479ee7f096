"""The short run: two stages, stopped and resumed, agree with one that is not; and what does not agree is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.gpu import training
from data.files import read_json
from tests.bench.toy import refused
from tests.launching import run_command


def test_both_stages_resumed_have_the_losses_of_the_run_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training.subprocess, "run", run_command)
    training.main(["--device", "cpu", "--json", str(tmp_path / "found.json")])
    out = capsys.readouterr().out
    assert out.count("at step 3") >= 2  # both went on
    found = read_json(tmp_path / "found.json")
    assert [(row["run"], row["compared with"]) for row in found["rows"]] == [
        ("zero-1", "cpu"),
        ("zero-3", "cpu"),
        ("zero-3", "zero-1"),
    ]
    for row in found["rows"]:
        assert 0 < row["last loss"] < row["first loss"]
        assert row["apart before resume"] <= 1e-5 and row["apart after"] <= 1e-5


def test_a_run_that_fails_is_one_sentence_after_its_last_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "prepare", lambda config: None)  # so there are no shards
    monkeypatch.setattr(training.subprocess, "run", run_command)
    monkeypatch.setattr(training, "STAGES", {"zero-1": 1})
    with pytest.raises(SystemExit) as ended:
        training.main(["--device", "cpu"])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert said.err == "error: the run zero-1 ended with status 78\n"
    assert "zero-1: error: " in said.out


def test_runs_that_do_not_agree_are_named() -> None:
    same = [3.0, 2.0, 1.5, 1.0]
    after = [3.0, 2.0, 1.5, 1.02]
    found = training.compare({"cpu": same, "zero-1": same, "zero-3": after}, half=2)
    rows = found["rows"]
    assert [row["apart before resume"] for row in rows] == [0, 0, 0]
    assert [row["apart after"] for row in rows] == pytest.approx([0, 0.02, 0.02])
    assert found["key"] == "losses apart: ZeRO 3 to ZeRO 1 2.0e-02 nats, both to the CPU 2.0e-02"
    with pytest.raises(ValueError, match=r"zero-3 is 2.00e-02 nats from cpu .at most 0.003.; zero-3 is .* from zero-1"):
        training.require(rows)
    training.require(training.compare(dict.fromkeys(("cpu", "zero-1", "zero-3"), same), half=2)["rows"])


@pytest.mark.parametrize("losses", [[3.0, math.nan, 2.0], [3.0, 2.0], [2.0, 2.5, 2.1]])
def test_a_run_must_have_learned(losses: list[float]) -> None:
    lines = [{"step": number, "train/loss": loss} for number, loss in enumerate(losses, start=1)]
    with pytest.raises(ValueError, match="every step must have a finite loss, and the last a lower one"):
        training.by_step(lines, steps=3)


def test_only_the_reference_is_kept_from_the_gpu() -> None:
    assert training.environment("cpu", "cuda")["CUDA_VISIBLE_DEVICES"] == ""
    assert training.environment("zero-1", "cuda").get("CUDA_VISIBLE_DEVICES") != ""
    assert training.environment("zero-1", "cpu")["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("module", ["facts", "training"])
def test_a_gpu_that_is_not_there_is_one_sentence(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import import_module

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = refused(import_module(f"bench.gpu.{module}").main, ["--device", "cuda"], capsys)
    assert "--device cuda asks for a CUDA device, but there is none" in said
