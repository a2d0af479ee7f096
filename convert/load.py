"""A decoder out of whatever holds one: a run of either stage, one of its checkpoints, or a folder of weights.

    loaded = load_any(Path("runs/demo-tuned"))
    loaded.decoder, loaded.tokenizer_folder, loaded.facts["validation_losses"]

Reading runs no code: see :mod:`trainer.checkpoints.read_weights` and :mod:`trainer.checkpoints.weights_folder`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from model.decoder import Decoder
from trainer.checkpoints import manifest
from trainer.checkpoints.read_weights import load_decoder
from trainer.checkpoints.weights_folder import is_weights_folder, read_weights
from trainer.config import StageConfig, is_stage_two
from trainer.distributed import ALONE
from tune.weights import load_tuned

PRETRAINED, TUNED, WEIGHTS = "pretrained", "tuned", "weights"
"""The values of ``facts["kind"]``."""
_VALIDATION, _DENSITY = "validation/", "density/"


class Loaded(NamedTuple):
    """A decoder, what belongs to it, and where it came from."""

    decoder: Decoder
    """fp32, on the CPU, in evaluation mode; adapters merged unless asked otherwise, the ensemble on."""
    tokenizer_folder: Path
    """Should hold ``tokenizer.model`` or ``tokenizer.json``; whether it does is not looked at."""
    facts: dict[str, Any]
    """What is known of the training, ready for JSON: ``kind`` and ``source`` always, ``step`` and the rest for runs."""
    source: Path
    """The checkpoint's folder or the folder of weights."""


def load_any(path: Path, merged: bool = True, disk: Path | None = None) -> Loaded:
    """The decoder that ``path`` holds.

    Args:
        path: a run folder of stage one or two (its newest whole checkpoint is taken), one checkpoint's folder, or a
            folder of weights (what ``convert.from_hf`` and ``tune.merge`` write).
        merged: a tuned run's adapters are part of the weights that they sit on.
        disk: keep the weights in a file without a name in this folder; in memory unless given.

    Raises:
        ValueError: if it holds none, or not a whole one.
    """
    if is_weights_folder(path):
        decoder = read_weights(path, disk)
        entries = {name: value for name, value in manifest.read(path, ALONE).items() if name not in ("format", "files")}
        return Loaded(decoder, path, {"source": str(path), **entries, "kind": WEIGHTS}, path)
    if (path / "config.json").is_file():
        raise ValueError(
            f"{path} is a Hugging Face folder, not a run; import it with: python -m convert.from_hf {path} OUT, and "
            "give that folder"
        )
    if is_stage_two(path / "config.yaml"):
        decoder, tuned, step = load_tuned(path, merged, disk)
        folder = _checkpoint(path, step)
        assert tuned.data.tokenizer is not None  # filled in when the run started
        facts = {"kind": TUNED, "base": tuned.base.path, "adapter": tuned.adapter.kind}
        return Loaded(decoder, Path(tuned.data.tokenizer), facts | _run_facts(folder, tuned, step), folder)
    decoder, config, step = load_decoder(path, disk)
    folder = _checkpoint(path, step)
    run = {"kind": PRETRAINED, "confine_attention": config.data.confine_attention}
    return Loaded(decoder, Path(config.data.dir), run | _run_facts(folder, config, step), folder)


def _checkpoint(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step-{step:08d}" if (path / "checkpoints").is_dir() else path


def _run_facts(checkpoint: Path, config: StageConfig, step: int) -> dict[str, Any]:
    """What config, manifest and metrics say of a run at ``step``; of the metrics nothing where they did not come along.

    Losses are nats per token, densities shares of the tokens.
    """
    written = manifest.read(checkpoint, ALONE)
    router = config.model.router
    facts: dict[str, Any] = {
        "source": str(checkpoint),
        "step": step,
        "world_size": written["world_size"],
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.train.precision,
        "target_density": None if router is None else router.density,
        "commit": written.get("commit"),
    }
    metrics = _metrics(checkpoint.parent.parent / "metrics.jsonl", step)
    losses = {
        name.removeprefix(_VALIDATION).removesuffix("/loss"): value for name, value in metrics.items() if _is_loss(name)
    }
    return facts | {
        "tokens": metrics.get("train/tokens"),
        "train_loss": metrics.get("train/loss"),
        "validation_losses": losses,
        "densities": {
            name.removeprefix(_DENSITY): value for name, value in metrics.items() if name.startswith(_DENSITY)
        },
        "executed_flops_per_token": metrics.get("flops/executed_per_token"),
        "dense_flops_per_token": metrics.get("flops/dense_per_token"),
    }


def _is_loss(name: str) -> bool:
    return name.startswith(_VALIDATION) and name.endswith("/loss")


def _metrics(path: Path, step: int) -> dict[str, Any]:
    """Of every metric the last value up to ``step``."""
    found: dict[str, Any] = {}
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            reached = entry["step"] <= step
        except (ValueError, KeyError, TypeError):  # the last line of a killed run
            continue
        if reached:
            found |= entry
    return found
