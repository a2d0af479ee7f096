"""A run's copy of its tokenizer, RUN/tokenizer: with it the run can be read from anywhere, and wherever it is copied.

The folder that a config names is relative to where the run was started, and may have changed since.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from data.files import temporary_name
from data.store import require_tokenizer_of_shards
from data.tokenization import find_tokenizer
from data.tokenizer_files import copy_tokenizer, tokenizer_contents
from trainer.checkpoints.layout import TOKENIZER, run_of


def keep_tokenizer(folder: Path, run: Path) -> None:
    """Copy the tokenizer in ``folder`` into ``run``, unless that very one is there; the copy is whole or absent.

    Raises:
        ValueError: if there is no tokenizer in ``folder``.
        OSError: if it cannot be written; the earlier copy, if any, stays.
    """
    kept, contents = run / TOKENIZER, tokenizer_contents(folder)
    if find_tokenizer(kept) is not None and tokenizer_contents(kept) == contents:
        return
    partial = temporary_name(kept)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed start
        copy_tokenizer(folder, partial)
        if kept.exists():
            shutil.rmtree(kept)
        partial.rename(kept)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def kept_tokenizer(path: Path) -> Path | None:
    """Folder of the copy in the run that ``path`` is, or is a checkpoint of; None if there is none."""
    run = run_of(path)
    return None if run is None or find_tokenizer(run / TOKENIZER) is None else run / TOKENIZER


def tokenizer_of(path: Path, named: Path) -> Path:
    """Folder of the tokenizer of ``path``, a run or a checkpoint: the run's copy, or ``named`` if it has none.

    Runs of earlier versions and checkpoints that were copied out of their run have no copy.

    Args:
        path: of the run or the checkpoint.
        named: the folder that its config names.

    Raises:
        ValueError: if neither is a tokenizer's; if ``named`` also holds shards that were made with another tokenizer.
    """
    if kept := kept_tokenizer(path):
        return kept
    if find_tokenizer(named) is None:
        raise ValueError(_not_found(path, named))
    require_tokenizer_of_shards(named)
    return named


def _not_found(path: Path, named: Path) -> str:
    run = run_of(path)
    fix = f"copy the tokenizer's files into {named if run is None else run / TOKENIZER}"
    where = str(named)
    if not named.is_absolute():
        where += ", which is relative to the folder in which the run was started"
        fix = f"run the command in that folder, or {fix}"
    return (
        f"{path}: its tokenizer is not found; its config names {where}, and neither tokenizer.json nor tokenizer.model "
        f"is there; {fix} (convert.to_hf also takes --tokenizer FOLDER)"
    )
