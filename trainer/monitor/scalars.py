"""Metrics of the steps since the last line of ``metrics.jsonl``, by name; docs/training.md has the table with units."""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.budget import Budget
from model.flops import Routed, training_flops, without_routers
from model.schedules import Progress
from trainer.config import StageConfig
from trainer.tally import StepResult


def loss_scalars(results: Sequence[StepResult]) -> dict[str, float]:
    """Losses and the gradient's norm, of the steps whose update was applied."""
    good = [r for r in results if r.applied]
    targets = sum(r.tally.targets for r in good)
    norms = [r.grad_norm for r in good if r.grad_norm is not None]
    return {
        "train/loss": sum(r.tally.nll for r in good) / targets if targets else math.nan,
        "train/z": sum(r.tally.z for r in good) / targets if targets else math.nan,
        "train/skipped_steps": len(results) - len(good),
        "optimizer/grad_norm": mean(norms) if norms else math.nan,
    }


def speed_scalars(
    config: StageConfig, results: Sequence[StepResult], elapsed_s: float, waited_s: float
) -> dict[str, float]:
    """FLOPs per token, as executed and for the same tokens without routers; speed of all ranks together."""
    routed = _sum([r.tally.routed for r in results])
    everything = Routed(routed.tokens, routed.visible_keys, [], [], routed.head_tokens)
    dense = training_flops(without_routers(config.model), everything, config.trained)
    return {
        "flops/executed_per_token": training_flops(config.model, routed, config.trained) / routed.tokens,
        "flops/dense_per_token": dense / routed.tokens,
        "speed/tokens_per_s": routed.tokens / elapsed_s,
        "speed/step_s": elapsed_s / len(results),
        "speed/data_wait_share": waited_s / elapsed_s,
    }


def imbalance_scalars(config: StageConfig, result: StepResult, ranks: int) -> dict[str, float]:
    """Work of the busiest rank in a step, relative to the mean over ranks; 1 if all did the same."""
    largest, routed, model = result.largest, result.tally.routed, config.model
    if largest is None:
        return {}
    own = training_flops(model, routed, config.trained) / ranks
    found = {
        "speed/imbalance": largest.flops / own,
        "speed/imbalance_every_layer": training_flops(model, largest.routed, config.trained) / own,
    }
    counts = zip(model.sites, largest.routed.executed_tokens, routed.executed_tokens, strict=True)
    return found | {f"speed/imbalance/{s}": most * ranks / total if total else math.nan for s, most, total in counts}


def density_scalars(
    sites: Sequence[str], results: Sequence[StepResult], budget: Budget, progress: Progress
) -> dict[str, float]:
    """Densities by site, the budget's target, prices and penalty."""
    good = [r for r in results if r.applied]
    routed = _sum([r.tally.routed for r in results])
    density = [tokens / routed.tokens for tokens in routed.executed_tokens]
    return {
        "budget/penalty": mean([r.penalty for r in good]) if good else math.nan,
        "budget/target": budget.target(progress),
        "density/mean": mean(density),
        "density/overflow": mean([r.tally.overflow for r in results]),
        **{f"density/{site}": value for site, value in zip(sites, density, strict=True)},
        **{f"budget/price/{site}": value for site, value in zip(sites, budget.prices().tolist(), strict=True)},
    }


def source_scalars(sources: Sequence[str], results: Sequence[StepResult]) -> dict[str, float]:
    """Loss on each source, and its share of the targets."""
    tallies = [r.tally for r in results if r.applied]
    targets = sum(t.targets for t in tallies)
    found: dict[str, float] = {}
    for place, source in enumerate(sources) if targets else ():
        own = sum(t.source_targets[place] for t in tallies)
        nll = sum(t.source_nll[place] for t in tallies)
        found |= {f"train/loss/{source}": nll / own if own else math.nan, f"train/share/{source}": own / targets}
    return found


def vote_scalars(layers: Sequence[str], results: Sequence[StepResult]) -> dict[str, float]:
    """The weights that the ensemble's router gives the late layers, their entropy, and the distillation loss."""
    tallies = [r.tally for r in results if r.applied]
    targets = sum(t.targets for t in tallies)
    if not targets:
        return {}
    found = {
        "ensemble/distillation": sum(t.distillation for t in tallies) / targets,
        "ensemble/entropy": sum(t.vote_entropy for t in tallies) / targets,
    }
    for place, layer in enumerate(layers):
        found[f"ensemble/weight/{layer}"] = sum(t.vote_weights[place] for t in tallies) / targets
        found[f"ensemble/largest/{layer}"] = sum(t.vote_largest[place] for t in tallies) / targets
    return found


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def _sum(parts: Sequence[Routed]) -> Routed:
    return Routed(
        sum(p.tokens for p in parts),
        sum(p.visible_keys for p in parts),
        [sum(site) for site in zip(*(p.executed_tokens for p in parts), strict=True)],
        [sum(site) for site in zip(*(p.attended_keys for p in parts), strict=True)],
        sum(p.tokens if p.head_tokens is None else p.head_tokens for p in parts),
        [sum(site) for site in zip(*(p.explored_tokens or () for p in parts), strict=True)],
        [sum(site) for site in zip(*(p.explored_keys or () for p in parts), strict=True)],
    )
