"""Checks of the folders named in stage two's config, before torch is imported."""

from __future__ import annotations

from pathlib import Path

from data.files import sha256_of
from settings import peek
from trainer.checkpoints import manifest
from trainer.checkpoints.layout import CONFIG, checkpoints_of, is_run, newest_first, what_is_there
from tune.config import BaseConfig, TuneFile


def require_base(folder: Path) -> None:
    """Refuse a folder that stage two cannot start from, by its config alone.

    Raises:
        ValueError: if it is no folder, or a stage-two run.
    """
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; give base.path a stage-one run, one of its checkpoints, or what "
            f"convert.from_hf wrote{what_is_there(folder)}"
        )
    blocks = peek(folder / CONFIG)
    if "base" in blocks:
        fix = f"merge them first with: python -m tune.merge {folder} OUT, and give base.path that folder"
        if blocks.get("ensemble") is not None:
            fix = "a second ensemble cannot be added to its own, so give base.path the model that it was tuned from"
        raise ValueError(f"{folder} is a stage-two run, whose weights apply on top of its own base; {fix}")


def base_folder(file: TuneFile) -> Path:
    """The folder that ``base.path`` means; for a run that is resumed, the checkpoint that it was tuned from.

    A run as ``base.path`` means its newest checkpoint, and it may have trained on since. The one with the hash in
    ``base.sha256`` of the resumed checkpoint's config, or else of ``file``, is taken then.

    Raises:
        ValueError: if the run that is resumed was tuned from one that is gone.
    """
    base, run_dir = Path(file.base.path), Path(str(file.train.run_dir))
    before = None if file.train.checkpoint.resume == "never" else _tuned_from(run_dir)
    sha256 = file.base.sha256 if before is None else before.sha256
    if is_run(base) and sha256 is not None:
        manifests = (found / manifest.NAME for found in newest_first(checkpoints_of(base)))
        if found := next((path for path in manifests if path.is_file() and sha256_of(path) == sha256), None):
            return found.parent
    elif base.is_dir():
        return base
    if before is None:
        return base
    raise ValueError(
        f"{run_dir} was tuned from {before.path}, without which it cannot be resumed, and base.path {base} does not "
        "have it; copy it back, or give base.path a folder that has it; or tune another base in a new train.run_dir. "
        f"What is tuned so far can be used without it: evaluated, exported, or merged (python -m tune.merge {run_dir} "
        "OUT)"
    )


def _tuned_from(run_dir: Path) -> BaseConfig | None:
    """The ``base`` block of the newest checkpoint in ``run_dir`` that has one."""
    blocks = (peek(found / CONFIG).get("base") for found in newest_first(checkpoints_of(run_dir)))
    found = next((block for block in blocks if block), None)
    return None if found is None else BaseConfig.model_validate(found)


def require_apart(run_dir: Path, base: Path) -> None:
    """Refuse a run whose folder is the base's, lies inside it, or contains it.

    Raises:
        ValueError: if it is.
    """
    run, folder = run_dir.resolve(), base.resolve()
    if run == folder or folder in run.parents or run in folder.parents:
        raise ValueError(
            f"train.run_dir {run_dir} and the base's folder {base} are the same, or one contains the other; give the "
            "tuned run a folder of its own"
        )
