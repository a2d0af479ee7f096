"""A run's copy of its tokenizer, with which the run can be read from anywhere."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from data.tokenization import tokenizer_sha256
from data.tokenizer_files import copy_tokenizer
from evals.scoring import open_model
from launch.configs import tokenizer_folder
from pretrain.initial import open_initial
from tests.evals.tiny import run_folder
from trainer.checkpoints import run_tokenizer
from trainer.checkpoints.run_tokenizer import keep_tokenizer, tokenizer_of
from trainer.config import InitConfig, PretrainConfig
from trainer.distributed import World
from trainer.exit_status import EXIT_MISTAKE
from trainer.run_folder import RunFolder
from tune.base import load_base
from tune.config import TuneFile

STEP = "checkpoints/step-00000007"


@pytest.fixture
def moved(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run that was started where its relative ``data.dir`` was; this process is elsewhere."""
    for name in ("started", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "started")
    shutil.copytree(tiny["data"]["dir"], "my-data")
    tiny["data"]["dir"] = "my-data"
    run_folder(Path("run"), tiny)
    keep_tokenizer(Path("my-data"), Path("run"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path(shutil.copytree(tmp_path / "started/run", "copied"))


def test_a_copied_run_is_read_from_another_folder(moved: Path, corpus: dict[str, Any], world: World) -> None:
    for path in (moved, moved / STEP, moved.absolute()):
        opened = open_model(path)
        assert opened.loaded.tokenizer_folder.samefile(moved / "tokenizer")
        assert opened.tokenizer.sha256 == tokenizer_sha256(corpus["dir"])
    assert load_base(moved).loaded.tokenizer_folder == moved / "tokenizer"  # relative, as base.path is
    stage_two: dict[str, Any] = {"base": {"path": str(moved)}, "train": {"steps": 1, "global_batch_samples": 1}}
    stage_two["data"] = {"sequence_tokens": 8, "sources": [{"name": "x", "files": ["x.jsonl"]}]}
    stage_two["train"] |= {"micro_batch_samples": 1, "optimizer": {"lr": 0.1}}
    assert tokenizer_folder(TuneFile.model_validate(stage_two)) == moved / "tokenizer"
    given = open_initial(InitConfig(path=str(moved)), opened.decoder.config, Path(corpus["dir"]), world)
    assert getattr(given, "tokenizer", None) == moved / "tokenizer"


def test_a_run_of_an_earlier_version_is_read_with_what_its_config_names(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(moved / "tokenizer")
    monkeypatch.chdir(tmp_path / "started")
    for path in (tmp_path / "elsewhere/copied", shutil.copytree(tmp_path / "elsewhere/copied" / STEP, "taken-out")):
        assert open_model(Path(path)).loaded.tokenizer_folder == Path("my-data")


def test_what_to_do_where_neither_is_found(moved: Path, tmp_path: Path) -> None:
    shutil.rmtree(moved / "tokenizer")
    step = moved / STEP
    for path in (moved, step):
        with pytest.raises(ValueError, match="its tokenizer is not found; its config names my-data, which is") as told:
            open_model(path)
        assert str(told.value).startswith(str(step))
        assert "relative to the folder in which the run was started" in str(told.value)
        assert "in that folder, or copy the tokenizer's files into copied/tokenizer (convert.to_hf" in str(told.value)
        assert "--tokenizer FOLDER" in str(told.value) and "data.tokenizer CONFIG" not in str(told.value)
    taken_out = shutil.copytree(step, tmp_path / "elsewhere/taken-out")
    with pytest.raises(ValueError, match="or copy the tokenizer's files into my-data "):
        tokenizer_of(taken_out, Path("my-data"))
    with pytest.raises(ValueError, match=r"names /none, and .* is there; copy the tokenizer's files into /none"):
        tokenizer_of(taken_out, Path("/none"))
    assert load_base(moved).model.vocab_size == 400  # stage two may name a tokenizer of its own


def test_the_same_tokenizer_is_copied_once_and_another_takes_its_place(tmp_path: Path, corpus: dict[str, Any]) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    copy_tokenizer(Path(corpus["dir"]), source)
    (run / "tokenizer.tmp").mkdir(parents=True)  # of a start that was killed
    (run / "tokenizer.tmp/tokenizer.json").write_text("half")
    keep_tokenizer(source, run)
    first = (run / "tokenizer/tokenizer.model").stat().st_ino
    keep_tokenizer(source, run)
    keep_tokenizer(run / "tokenizer", run)
    assert (run / "tokenizer/tokenizer.model").stat().st_ino == first
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    keep_tokenizer(source, run)
    (source / "generation_config.json").unlink()
    assert {path.name for path in (run / "tokenizer").iterdir()} == {"generation_config.json", "tokenizer.model"}
    keep_tokenizer(source, run)
    assert [path.name for path in run.rglob("*")] == ["tokenizer", "tokenizer.model"]


def test_a_full_disk_leaves_no_half_of_it(
    configure: Callable[..., PretrainConfig],
    write_config: Callable[..., str],
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunFolder(tiny["train"]["run_dir"], 0)

    def fill(folder: Path, out: Path) -> None:
        out.mkdir(parents=True)
        (out / "tokenizer_config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    def claimed() -> str | None:
        with ExitStack() as hold:
            return run.claim(configure(), write_config(tiny), hold)

    with monkeypatch.context() as patch:
        patch.setattr(run_tokenizer, "copy_tokenizer", fill)
        told = claimed()
        assert told is not None and str(run.path) in told and "No space left on device" in told
        assert not list(run.path.glob("tokenizer*"))
    assert claimed() is None and (run.path / "tokenizer/tokenizer.model").is_file()
    (run.path / "tokenizer/generation_config.json").write_text("{}")  # so that it is to be replaced
    monkeypatch.setattr(run_tokenizer, "copy_tokenizer", fill)
    assert claimed() is not None
    assert [path.name for path in run.path.glob("tokenizer*")] == ["tokenizer"]
    assert (run.path / "tokenizer/tokenizer.model").is_file()


def test_a_resume_with_another_tokenizer_is_refused_and_leaves_the_copy(
    tiny: dict[str, Any],
    mixed: dict[str, Any],
    train_here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = tokenizer_sha256(tiny["data"]["dir"])
    assert tokenizer_sha256(mixed["dir"]) != theirs
    assert train_here(tiny, "train.steps=2") == 0
    assert train_here({**tiny, "data": mixed}, "train.checkpoint.resume=required") == EXIT_MISTAKE
    assert "was trained on other data" in capsys.readouterr().err
    assert tokenizer_sha256(Path(tiny["train"]["run_dir"]) / "tokenizer") == theirs
