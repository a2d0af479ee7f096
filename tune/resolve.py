"""Completes a stage-two config: fills in the base's model block and the tokenizer's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from model.config import ModelConfig
from settings import load
from trainer.config import name_run
from tune.config import TuneConfig, TuneFile
from tune.preflight import require_apart

if TYPE_CHECKING:
    from tune.base import Base


def load_file(path: str | Path, overrides: Sequence[str] = ()) -> TuneFile:
    """A stage-two config from its file and the command line, with the run folder's name filled in.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    file = load(path, overrides, TuneFile)
    return file.model_copy(update={"train": name_run(file.train, path)})


def resolve(file: TuneFile, base: Base) -> TuneConfig:
    """``file`` with its base's model and tokenizer.

    Raises:
        ValueError: if blocks and base are incompatible, or the file's own model block differs from the base's.
    """
    from tune.base import stage_two_model

    model = stage_two_model(base.model, file.base)
    if file.model is not None:
        _refuse_another_model(file.model, model, file.base.path)
    blocks = file.model_dump(mode="json") | {"model": model.model_dump(mode="json")}
    if blocks["data"]["tokenizer"] is None:
        blocks["data"]["tokenizer"] = str(base.loaded.tokenizer_folder)
    if file.base.sha256 not in (None, base.fingerprint):
        raise ValueError(
            f"the base {file.base.path} differs from the one that this config was resolved with (base.sha256 "
            f"{str(file.base.sha256)[:12]}, found {base.fingerprint[:12]}); give base.path that one, for example its "
            "checkpoint, or leave base.sha256 out"
        )
    require_apart(Path(str(file.train.run_dir)), Path(file.base.path))
    blocks["base"] |= {"path": str(base.loaded.source), "sha256": base.fingerprint}
    if blocks["base"]["seed"] is None:
        blocks["base"]["seed"] = base.decoder.seed
    try:
        return TuneConfig.model_validate(blocks)
    except ValidationError as error:
        # Every field was valid in the file; what is left are our own messages on incompatible blocks.
        raise ValueError("; ".join(str(e["ctx"]["error"]) for e in error.errors())) from None


def _refuse_another_model(written: ModelConfig, model: ModelConfig, path: str) -> None:
    there, here = model.model_dump(mode="json"), written.model_dump(mode="json")
    differ = [
        f"model.{key} {_short(there[key])} there, {_short(here[key])} here" for key in there if there[key] != here[key]
    ]
    if differ:
        raise ValueError(
            f"the base {path} has a model that differs from this config's model block ({'; '.join(differ)}); leave the "
            "model block out, as it is taken from the base"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
