"""One step of a tiny routed model, and two compared; the kinds, granularities and executions that tests run over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder, DecoderOutput
from tests.model.tiny import LENGTH, assert_close, documents_of, gradients, random_targets, random_tokens

BATCH = 3
KINDS = ["learned", "random", "stride", "expert_choice"]
granular = pytest.mark.parametrize("granularity", ["layer", "module"])
EXECUTIONS = ["rounded", "reference"]
executions = pytest.mark.parametrize("execution", EXECUTIONS)


def step(model: Decoder, confined: bool = False) -> tuple[DecoderOutput, dict[str, Tensor]]:
    """One forward and backward pass with a price on density, as the trainer does it."""
    documents, positions = documents_of(9, 16, 8) if confined else (None, None)
    out = model(
        random_tokens(),
        random_targets(),
        sample_ids=torch.tensor([11, 5, 2]),
        documents=documents,
        positions=positions,
        noise_scale=0.7,
        temperature=0.8,
        z_coefficient=1e-3,
    )
    prices = torch.linspace(-3, 5, len(out.routing.density))
    loss = out.loss.loss + (prices * out.routing.density).sum()
    loss.backward()
    return out, gradients(model)


def masks(name: str, sites: int) -> Tensor:
    """bool [S, B, T] of a named pattern."""
    found = torch.rand(sites, BATCH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
    if name == "empty row":
        found[:, 1] = False
    elif name == "empty layer":
        found[sites // 2] = False
    elif name == "all empty":
        found[:] = False
    elif name == "all executed":
        found[:] = True
    elif name == "one token":
        found[:] = False
        found[:, 2, 20] = True
    return found


def assert_same_step(first: Decoder, second: Decoder, confined: bool = False) -> None:
    (a, a_gradients), (b, b_gradients) = step(first, confined), step(second, confined)
    assert torch.equal(a.routing.executed, b.routing.executed)
    for name in ("loss", "nll", "z"):
        assert_close(getattr(a.loss, name), getattr(b.loss, name))
    assert_close(a.routing.density, b.routing.density)
    for name in ("executed_tokens", "attended_keys", "visible_keys"):
        assert torch.equal(getattr(a.routing, name), getattr(b.routing, name))
    for name, gradient in b_gradients.items():
        assert_close(a_gradients[name], gradient)
