"""What must agree between a run and existing checkpoints: ``resume``, conditions, sizes, routers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig, RouterConfig

if TYPE_CHECKING:
    from trainer.config import StageConfig
    from trainer.distributed import World


def refuse_taken(folder: Path | str, there: Sequence[str], resume: str, setting: str = "train.run_dir") -> None:
    """Raise ValueError if ``resume`` does not allow a start where ``folder`` holds the checkpoints ``there``.

    If it may resume, :func:`trainer.checkpoints.resume.find_checkpoint` checks whether one of them is whole.

    Args:
        folder: of the checkpoints, or the URL of their mirror.
        there: their names, newest first.
        resume: as in the config.
        setting: the field that says where ``folder`` is.
    """
    if there and resume == "never":
        raise ValueError(
            f"{folder} already holds {there[0]}; set train.checkpoint.resume=auto to go on with that run, or "
            f"give another {setting}"
        )
    if not there and resume == "required":
        raise ValueError(
            f"cannot resume from {folder}: there is no checkpoint; check {setting}, or start from scratch "
            "with train.checkpoint.resume=never"
        )


def conditions(config: StageConfig, world: World) -> dict[str, Any]:
    """What decides how a checkpoint's state is laid out and computed, besides the data and the model."""
    return {
        "world_size": world.size,
        "zero_stage": config.deepspeed.zero_stage,
        "precision": config.train.precision,
        "optimizer": config.train.optimizer.kind,
        "seed": config.train.seed,
    }


def differences(there: dict[str, Any], here: ModelConfig) -> list[str]:
    """How the model of a checkpoint differs from this config's, in words; empty if its weights fit.

    Densities, budgets, noise and the like may differ: they may change during a run without changing the weights.

    Args:
        there: the ``model`` block of the checkpoint's ``config.yaml``.
        here: this config's.
    """
    sizes = here.model_dump(mode="json")
    changed = [
        f"model.{key} {there.get(key)} there, {value} here"
        for key, value in sizes.items()
        if key != "router" and there.get(key) != value
    ]
    routers = there["router"] or {}, sizes["router"] or {}
    if bool(routers[0]) != bool(routers[1]):
        return [
            *changed,
            f"model.router {'set' if routers[0] else 'null'} there, {'set' if routers[1] else 'null'} here",
        ]
    for key in ("granularity", "kind", "input", "always_on_first", "always_on_last", "layers"):
        default = RouterConfig.model_fields[key].default  # for a field that is newer than the checkpoint
        then, now = (router.get(key, default) for router in routers)
        if then != now:
            changed.append(f"router {key} {then} there, {now} here")
    return changed
