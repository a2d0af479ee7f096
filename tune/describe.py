"""What a stage-two run reports at its start; its end is reported as in stage one."""

from __future__ import annotations

from collections.abc import Sequence

from model.decoder import Decoder
from trainer.distributed import World
from trainer.monitor.summary import machine
from tune.adapters import trainable_counts
from tune.base import Base
from tune.batches import ExampleSet, TuningData
from tune.config import TuneConfig


def describe_start(
    config: TuneConfig, base: Base, data: TuningData, sets: Sequence[ExampleSet], decoder: Decoder, world: World
) -> str:
    """Base, method, trainable parameters, data, evaluation sets and machine, a line each."""
    train, ensemble = config.train, config.ensemble
    trained, total = trainable_counts(decoder)
    lines = [
        f"base      {base.description}",
        f"routers   {config.base.routers}" if config.model.sites else "routers   none",
        f"method    {describe_method(config)}",
        f"trained   {trained:,} of {total:,} parameters ({trained / total:.2%})",
        f"training  {train.steps:,} steps of {train.global_batch_samples} windows of {config.data.sequence_tokens} "
        "tokens",
    ]
    if ensemble is not None:
        norms = "copies of the final one" if ensemble.start == "copy" else "fitted to the final one's states"
        lines.insert(
            3,
            f"ensemble  the last {ensemble.layers} layers, norms {norms}, open by {ensemble.open_by:.0%} of the "
            f"steps, final weight {ensemble.final_weight} then, distillation {ensemble.distillation}, "
            f"balance {ensemble.balance}",
        )
    for source in data.summary(train.samples):
        lines.append(f"data      {source.sentence()}")
    lines += [f"evaluated {example_set.sentence()}" for example_set in sets]
    return "\n".join([*lines, machine(config, world)])


def describe_method(config: TuneConfig) -> str:
    """The tuning method in half a sentence."""
    adapter = config.adapter
    if adapter.kind in ("full", "none"):
        return "all weights" if adapter.kind == "full" else "backbone frozen"
    where = {
        "all": "in every layer",
        "early": "in the layers before the ensemble's",
        "late": "in the ensemble's layers",
    }[adapter.layers]
    return f"{adapter.kind} of rank {adapter.rank}, alpha {adapter.alpha:g}, {where}, on {', '.join(adapter.targets)}"
