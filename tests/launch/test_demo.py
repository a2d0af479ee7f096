"""The demo is the commands that a user would type; that they work is ``make demo``'s business."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from launch import demo
from tests.launching import ROOT, run


def test_commands_in_order_with_this_environments_programs() -> None:
    python, deepspeed = sys.executable, str(Path(sys.executable).with_name("deepspeed"))
    launcher = [deepspeed, "--log_level", "error", "--num_gpus", "2", "--master_port", "29123"]
    assert demo.commands("configs/demo.yaml", "configs/tune_demo.yaml", 2, 29123) == [
        [python, "-m", "data.tokenizer", "configs/demo.yaml"],
        [python, "-m", "data.prepare", "configs/demo.yaml"],
        [*launcher, "--module", "pretrain.train", "configs/demo.yaml"],
        [python, "-m", "launch.demo_examples", "runs/demo-data"],
        [*launcher, "--module", "tune.train", "configs/tune_demo.yaml"],
        [python, "-m", "convert.to_hf", "runs/demo-tuned", "runs/demo-hf"],
        [python, "-m", "launch.demo_sentence", "runs/demo-hf"],
    ]
    assert Path(deepspeed).exists()
    for command in demo.commands("x", "configs/tune_demo.yaml", 1, 29123):
        module = command[command.index("--module" if "--module" in command else "-m") + 1]
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_a_missing_config_is_one_sentence_and_status_1() -> None:
    done = run("launch.demo", "configs/no-such.yaml", "configs/tune_demo.yaml")
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1].startswith("error: config file configs/no-such.yaml does not exist")
    assert "demo.yaml" in done.stdout and "Traceback" not in done.stdout


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that the demo ran; the third one fails with status 7."""
    commands: list[list[str]] = []

    def fake(command: list[str], check: bool) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=7 if "pretrain.train" in command else 0)

    monkeypatch.setattr(subprocess, "run", fake)
    return commands


@pytest.fixture
def tune_config(tmp_path: Path) -> str:
    """The demo's stage two with a run folder of its own."""
    config = yaml.safe_load((ROOT / "configs/tune_demo.yaml").read_text())
    config["train"]["run_dir"] = str(tmp_path / "tuned")
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_it_starts_afresh_and_ends_with_the_status_of_what_failed(
    ran: list[list[str]],
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    tune_config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, run_dir = write_config(tiny), Path(tiny["train"]["run_dir"])
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("the run before")
    tuned = Path(tune_config).with_name("tuned")
    tuned.mkdir()
    monkeypatch.setattr(demo, "EXPORT", tuned.with_name("export"))
    monkeypatch.setattr(sys, "argv", ["launch.demo", config, tune_config, "--processes", "3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.main() == 7
    assert not run_dir.exists() and not tuned.exists() and list(tuned.parent.glob("tuned-before-*"))
    (kept,) = run_dir.parent.glob("run-before-*")
    assert (kept / "metrics.jsonl").read_text() == "the run before"
    port = int(ran[-1][ran[-1].index("--master_port") + 1])
    assert port >= 1024 and ran == demo.commands(config, tune_config, 3, port)[:3]
    printed = capsys.readouterr().out
    assert f"$ {Path(sys.executable).name} -m data.tokenizer {config}" in printed and "demo done" not in printed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    demo.main()
    assert ran[-1][ran[-1].index("--num_gpus") + 1] == "1"  # a rank more than there are GPUs would only wait


def test_a_folder_without_an_export_is_one_sentence() -> None:
    done = run("launch.demo_sentence", "runs/no-such")
    assert done.returncode == 1 and "runs/no-such is no export: it has no config.json" in done.stdout


def test_the_end_says_where_things_lie(
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    tune_config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.demo", write_config(tiny), tune_config])
    monkeypatch.setattr(demo, "commands", lambda config, tune_config, processes, port: [[sys.executable, "-c", ""]])
    assert demo.main() == 0
    spec = f"run:{tiny['train']['run_dir']},tuned:{Path(tune_config).with_name('tuned')}"
    assert f"tensorboard --logdir_spec {spec}" in capsys.readouterr().out
