"""Tiny models, tokens and documents that the tests of ``model/`` share.

Weights are drawn wider than in training, and norm weights off their ones, so that a wrong mask, a missed norm or a
leak moves logits by far more than the tolerances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.chunks import IGNORE_INDEX
from model.config import ModelConfig
from model.decoder import Decoder
from model.init import initialise
from model.router import Gate, RoutingInputs
from model.schedules import Progress

VOCABULARY, LENGTH = 97, 33
SIZES = {
    "vocab_size": VOCABULARY,
    "layers": 3,
    "width": 64,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 96,
    "init_std": 0.1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha-qk-norm": {"kv_heads": 4, "qk_norm": True},
    "mqa-tied-wide-head": {"kv_heads": 1, "tied_head": True, "head_width": 24},
}


def share(done: float) -> Progress:
    """How far a run is, by the share of its steps."""
    return Progress(done, 1.0)


def config(kind: str = "learned", variant: str = "gqa", **router: Any) -> ModelConfig:
    """A tiny model's config; ``kind`` is a router kind or ``dense``, ``router`` holds the router's other fields."""
    block = None if kind == "dense" else {"kind": kind, "density": 0.5, **router}
    return ModelConfig.model_validate({**SIZES, **VARIANTS[variant], "router": block})


def decoder(model_config: ModelConfig, seed: int = 1, recompute: bool = False) -> Decoder:
    """A model in training mode with reproducible weights, norms included."""
    model = Decoder(model_config, seed=seed, recompute=recompute)
    initialise(model, model_config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def random_tokens(batch: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    """int64 [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_targets(batch: int = 3, length: int = LENGTH, seed: int = 5) -> Tensor:
    """int64 [batch, length], some of them ignored."""
    targets = random_tokens(batch, length, seed)
    targets[:, 3::7] = IGNORE_INDEX
    return targets


def documents_of(*lengths: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Documents and restarting positions of rows packed from documents of these lengths, int64 [batch, sum]."""
    documents = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    return documents.expand(batch, -1).clone(), positions.expand(batch, -1).clone()


class Forced(nn.Module):
    """A router whose decisions are given, with the gradient of the router that it wraps."""

    def __init__(self, router: nn.Module, mask: Tensor):
        super().__init__()
        self.router, self.mask = router, mask

    def forward(self, x: Tensor, inputs: RoutingInputs) -> Gate:
        value = self.router(x, inputs).value
        return Gate(self.mask, self.mask.float() + (value - value.detach()))


def force(model: Decoder, masks: Tensor) -> Decoder:
    """Make the routed sites of ``model`` execute ``masks``, bool [S, B, T]."""
    names = ("router", "attention_router", "ffn_router")
    sites = [(layer, name) for layer in model.layers for name in names if hasattr(layer, name)]
    for (layer, name), mask in zip(sites, masks, strict=True):
        setattr(layer, name, Forced(getattr(layer, name), mask))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; a missing one fails the test that asked."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance``, relative to the largest expected entry where that exceeds 1."""
    scale = max(float(expected.detach().abs().max()), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
