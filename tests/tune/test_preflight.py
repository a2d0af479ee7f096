"""Which folder ``base.path`` means, in a fresh start and in a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.files import sha256_of
from tests.evals.tiny import run_folder
from trainer.checkpoints import manifest
from trainer.checkpoints.resume import _refuse_other_model
from trainer.distributed import ALONE
from tune.base import base_of, load_base
from tune.config import TuneFile
from tune.preflight import base_folder
from tune.resolve import resolve
from tune.train import load_checked


@pytest.fixture
def base(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """A stage-one run with checkpoints of step 7 and of step 8, which it has gone on to."""
    folder = run_folder(tmp_path / "base", tiny)
    newer = shutil.copytree(folder / "checkpoints/step-00000007", folder / "checkpoints/step-00000008")
    (newer / manifest.NAME).unlink()
    manifest.write(newer, {"step": 8, "world_size": 1})
    return folder


@pytest.fixture
def tuning(base: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "examples.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    source = {"name": "some", "files": [str(tmp_path / "examples.jsonl")]}
    return {
        "base": {"path": str(base)},
        "data": {"sequence_tokens": 32, "sources": [source]},
        "train": {
            "run_dir": str(tmp_path / "tuned"), "steps": 4, "global_batch_samples": 4, "micro_batch_samples": 1,
            "precision": "fp32", "optimizer": {"lr": 0.01}, "checkpoint": {"resume": "auto"},
        },
    }  # fmt: skip


def _tuned(tuning: dict[str, Any], path: Path) -> None:
    """Leave a checkpoint in the run folder as if ``path`` had been tuned."""
    block = {"path": str(path), "sha256": sha256_of(path / manifest.NAME)}
    checkpoint = Path(tuning["train"]["run_dir"]) / "checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(tuning | {"base": block}))


def test_the_saved_config_names_the_checkpoint_that_was_taken(base: Path, tuning: dict[str, Any]) -> None:
    file = TuneFile.model_validate(tuning)
    assert base_folder(file) == base
    assert resolve(file, base_of(file, ALONE)).base.path == str(base / "checkpoints/step-00000008")


def test_a_resume_takes_the_checkpoint_that_was_tuned(base: Path, tuning: dict[str, Any], tmp_path: Path) -> None:
    older = base / "checkpoints/step-00000007"
    _tuned(tuning, older)
    file = TuneFile.model_validate(tuning)
    assert base_folder(file) == older and base_of(file, ALONE).loaded.step == 7
    fresh = tuning | {"train": tuning["train"] | {"checkpoint": {"resume": "never"}}}
    assert base_folder(TuneFile.model_validate(fresh)) == base
    moved = shutil.copytree(base, tmp_path / "moved")
    for path, meant in ((moved, moved / "checkpoints/step-00000007"), (older, older)):
        assert base_folder(TuneFile.model_validate(tuning | {"base": {"path": str(path)}})) == meant
    shutil.rmtree(tmp_path / "tuned")
    sha256 = sha256_of(older / manifest.NAME)  # a saved config of an earlier version, run again
    assert base_folder(TuneFile.model_validate(tuning | {"base": {"path": str(base), "sha256": sha256}})) == older


def test_a_checkpoint_that_is_gone_is_named_with_what_can_be_done(
    base: Path, tuning: dict[str, Any], tmp_path: Path
) -> None:
    older, config = base / "checkpoints/step-00000007", tmp_path / "tune.yaml"
    _tuned(tuning, older)
    shutil.rmtree(older)
    for path in (base, older):
        config.write_text(yaml.safe_dump(tuning | {"base": {"path": str(path)}}))
        with pytest.raises(ValueError, match="without which it cannot be resumed") as told:
            load_checked(config, [])
        assert f"tuned was tuned from {older}, " in str(told.value) and f"base.path {path} does not" in str(told.value)
        assert f"python -m tune.merge {tmp_path / 'tuned'} OUT" in str(told.value)
    with pytest.raises(ValueError, match="without which it cannot be resumed"):
        base_of(TuneFile.model_validate(tuning), ALONE)


def test_another_base_is_refused_with_the_name_of_the_tuned_one(base: Path, tuning: dict[str, Any]) -> None:
    """As where the run's checkpoint is in its mirror only, so that it is read after the base."""
    older, newer = (resolve(file, load_base(file.base.path)) for file in _both(base, tuning))
    blocks = older.model_dump(mode="json")
    with pytest.raises(
        ValueError, match=r"holds a different model \(another base: .* than \S*/step-00000007, which was tun"
    ):
        _refuse_other_model(blocks, Path("tuned"), newer)
    _refuse_other_model(blocks, Path("tuned"), older)


def _both(base: Path, tuning: dict[str, Any]) -> list[TuneFile]:
    paths = [base / f"checkpoints/step-0000000{step}" for step in (7, 8)]
    return [TuneFile.model_validate(tuning | {"base": {"path": str(path)}}) for path in paths]


def test_a_hash_that_no_checkpoint_has_is_refused_in_a_fresh_start(base: Path, tuning: dict[str, Any]) -> None:
    file = TuneFile.model_validate(tuning | {"base": {"path": str(base), "sha256": "0" * 64}})
    with pytest.raises(ValueError, match=r"differs from the one that this config was .* leave base.sha256 out"):
        resolve(file, load_base(base_folder(file)))
