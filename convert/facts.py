"""Facts about a model's training, for the model card of its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.checkpoints import manifest
from trainer.checkpoints.layout import run_of
from trainer.config import PretrainConfig, StageConfig, WeightsConfig
from trainer.distributed import ALONE
from trainer.monitor import metrics_file
from tune.load import Loaded

PRETRAINED, TUNED, WEIGHTS = "pretrained", "tuned", "weights"
"""The values of ``kind``."""


def facts_of(loaded: Loaded) -> dict[str, Any]:
    """JSON-serialisable facts: ``kind`` and ``source`` always, ``step`` and the rest for runs."""
    config, source = loaded.config, loaded.source
    if isinstance(config, WeightsConfig):
        entries = {n: value for n, value in manifest.read(source, ALONE).items() if n not in ("format", "files")}
        return {"source": str(source), **entries, "kind": WEIGHTS}
    assert loaded.step is not None
    if isinstance(config, PretrainConfig):
        own: dict[str, Any] = {"kind": PRETRAINED, "confine_attention": config.data.confine_attention}
    else:
        own = {"kind": TUNED, "base": config.base.path, "adapter": config.adapter.kind}
    return own | _run_facts(source, config, loaded.step)


def _run_facts(checkpoint: Path, config: StageConfig, step: int) -> dict[str, Any]:
    """Facts from a run's config, manifest and metrics at ``step``; those from metrics are None if these are missing.

    Losses are nats per token, densities shares of the tokens.
    """
    written = manifest.read(checkpoint, ALONE)
    router = config.model.router
    facts: dict[str, Any] = {
        "source": str(checkpoint),
        "init": written.get("init"),
        "step": step,
        "world_size": written["world_size"],
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.train.precision,
        "target_density": None if router is None else router.density,
        "commit": written.get("commit"),
    }
    run = run_of(checkpoint)
    metrics = {} if run is None else metrics_file.latest(run / metrics_file.NAME, step)
    return facts | {
        "tokens": metrics.get("train/tokens"),
        "train_loss": metrics.get("train/loss"),
        "validation_losses": metrics_file.losses_of(metrics),
        "densities": metrics_file.under("density/", metrics),
        "executed_flops_per_token": metrics.get("flops/executed_per_token"),
        "dense_flops_per_token": metrics.get("flops/dense_per_token"),
    }
