"""Activation checkpointing changes no bit, and keeps one residual stream a site."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.model.routed_steps import BATCH, KINDS, executions, granular, step
from tests.model.tiny import LENGTH, config, decoder, random_targets, random_tokens


@dataclass(eq=False)
class Saved:
    """A tensor that autograd keeps."""

    tensor: Tensor


@pytest.mark.parametrize("kind", ["dense", *KINDS])
@granular
@executions
def test_recomputation_changes_no_bit(kind: str, granularity: str, execution: str) -> None:
    found = []
    for recompute in (False, True):
        explore = 0.3 if kind == "learned" else 0.0
        model = decoder(
            config(kind, granularity=granularity, execution=execution, explore=explore), recompute=recompute
        )
        calls = []
        model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append(step(model))
        assert len(calls) == 1 + recompute + (explore > 0)
    (a, a_gradients), (b, b_gradients) = found
    assert torch.equal(a.loss.loss, b.loss.loss) and torch.equal(a.routing.executed, b.routing.executed)
    for name in a_gradients:
        assert torch.equal(a_gradients[name], b_gradients[name]), name


@granular
def test_recomputation_keeps_one_residual_stream_a_site(granularity: str) -> None:
    """Neither its norm nor an update; the final norm and the head keep one tensor each."""
    model = decoder(config("learned", granularity=granularity), recompute=True)
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()  # what is dropped on the way leaves it

    def pack(tensor: Tensor) -> Saved:
        alive.add(saved := Saved(tensor.detach()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        out = model(random_tokens(), random_targets(), noise_scale=0.7)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    streams = {s.tensor.untyped_storage().data_ptr() for s in alive if s.tensor.numel() >= BATCH * LENGTH * 64}
    assert len(streams - weights) == len(model.config.sites) + 2
    assert out.loss is not None
