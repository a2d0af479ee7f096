"""A tracker that cannot work is a sentence before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.test_commands import run_light
from trainer.exit_status import EXIT_MISTAKE
from trainer.monitor.trackers.check import refuse_unusable


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no address, whatever this machine has."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_library_that_is_missing_is_told_with_its_command(
    tracker: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse_unusable(["tensorboard"])
    told = rf"train.log.trackers has {tracker}, which is not installed; .*python -m pip install {package}$"
    with pytest.raises(ValueError, match=told):
        refuse_unusable(["tensorboard", tracker])


def test_wandb_needs_a_key_unless_it_is_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.teardown()  # the library keeps what it has read of the environment
    with pytest.raises(ValueError, match=r"there is no API key; log in once with `.*wandb login`, export WANDB"):
        refuse_unusable(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    refuse_unusable(["wandb"])
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + 40 * "a")
    refuse_unusable(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ValueError, match="there is no API key"):
        refuse_unusable(["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    refuse_unusable(["wandb"])


def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    with pytest.raises(ValueError, match=r"export MLFLOW_TRACKING_URI=http://HOST:5000"):
        refuse_unusable(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    refuse_unusable(["mlflow"])


def test_both_stages_say_so_before_anything_heavy(tmp_path: Path, tiny, write_config) -> None:
    config = write_config(tiny)
    (unset,) = run_light("pretrain.train", [config, "train.log.trackers=[mlflow]"])
    assert unset[0] == EXIT_MISTAKE and "error: train.log.trackers has mlflow, " in unset[1]
    (unknown,) = run_light("pretrain.train", [config, "train.log.trackers=[tensorbord]"])
    assert unknown[0] == EXIT_MISTAKE and "train.log.trackers" in unknown[1] and "wandb" in unknown[1]
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.yaml").write_text("model: {}")
    (tmp_path / "examples.jsonl").write_text("")
    sources = f"[{{name: own, files: [{tmp_path / 'examples.jsonl'}]}}]"
    there = [
        f"base.path={tmp_path / 'base'}",
        *(f"data.{part}={sources}" for part in ("sources", "validation", "test")),
    ]
    (unset,) = run_light("tune.train", ["configs/tune_demo.yaml", *there, "train.log.trackers=[mlflow]"])
    assert unset[0] == EXIT_MISTAKE and "error: train.log.trackers has mlflow, " in unset[1]
