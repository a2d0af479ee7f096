"""What a decoder's parameter is for, by its name: initialisation, optimisers and tuning treat roles differently."""

from __future__ import annotations

from typing import Literal

Role = Literal["embedding", "head", "norm", "router", "vote", "magnitude", "matrix"]

_OUTER: dict[str, Role] = {"embed_tokens": "embedding", "lm_head": "head"}


def role_of(name: str) -> Role:
    """The role of parameter ``name``, as ``named_parameters`` has it, with adapters or without.

    =========  ========================================================================
    embedding  of tokens; a tied head is the same parameter
    head       to the vocabulary
    norm       weights of all norms, those of queries, keys and late layers included
    router     skip routers, and the bias of the ensemble's
    vote       the ensemble's router, whose logits weigh the late layers
    magnitude  DoRA's, of the rows of an adapted projection
    matrix     projections of attention and feed-forward, and the adapters beside them
    =========  ========================================================================
    """
    if name == "ensemble.router.weight":
        return "vote"
    modules = name.split(".")
    if any(module.endswith("router") for module in modules):
        return "router"
    if "lora_magnitude_vector" in modules:
        return "magnitude"
    if any("norm" in module for module in modules):
        return "norm"
    return _OUTER.get(modules[0], "matrix")
