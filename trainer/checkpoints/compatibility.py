"""Whether the weights of one model are weights of another: sizes, and what routers there are."""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig, RouterConfig


def differences(there: dict[str, Any], here: ModelConfig) -> list[str]:
    """In words, where the model of a checkpoint is not the one of this config; none where its weights fit.

    Densities, budgets, noise and the like may differ: they change on the way, the weights stay what they are.

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
    for key in ("granularity", "kind", "input", "always_on_first", "always_on_last", "layers"):
        default = RouterConfig.model_fields[key].default  # of a field that is younger than the checkpoint
        then, now = (router.get(key, default) if router else None for router in routers)
        if then != now:
            changed.append(f"router {key} {then} there, {now} here")
    return changed
