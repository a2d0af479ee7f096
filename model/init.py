"""Initialisation: one table, one generator per parameter.

Every parameter is drawn in fp32 on the CPU from a generator keyed by the seed and the parameter's name. So the values
do not depend on the order of construction, the number of ranks or the ZeRO stage, and adding a router changes no
other weight: ``dense`` and ``skip`` runs with one seed start from the same backbone.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.roles import role_of


def init_std(name: str, config: ModelConfig) -> float | None:
    """Standard deviation of the normal distribution that parameter ``name`` is drawn from; None for ones.

    ===================================  =============================================================
    norms                                ones
    ``o_proj``, ``down_proj``            init_std / sqrt(2 x layers): 2 x layers of them add to the residual stream
    routers                              init_std: logits spread by about init_std x sqrt(width) on normed input
    embedding, head, everything else     init_std
    ===================================  =============================================================
    """
    if role_of(name) == "norm":
        return None
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw all weights of ``model``, a ``Decoder`` of ``config``, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_values(name, parameter.shape, config, seed))


def initial_values(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial values of a decoder's parameter, fp32 on the CPU."""
    std = init_std(name, config)
    values = torch.empty(shape, dtype=torch.float32)
    return values.fill_(1.0) if std is None else values.normal_(0.0, std, generator=generator_of(seed, name))


def generator_of(seed: int, name: str) -> torch.Generator:
    """The CPU generator that parameter ``name`` is drawn from."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
