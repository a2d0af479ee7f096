"""Contestants compute what they should: held decisions at a learned router's full cost, counted FLOPs, whole memory."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench.common.contestants import (
    Contestant,
    HeldRouter,
    Ours,
    Peer,
    assert_same,
    draw,
    held_decoder,
    held_llama,
    random_tokens,
)
from bench.common.memory import peak_bytes
from bench.common.options import model_config, routed_name
from model.config import Capacity, RouterConfig
from model.flops import Routed, dense_flops, executed_flops

CPU = torch.device("cpu")
SIZES = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "ffn_width": 96, "vocab": 128}
TOKENS = random_tokens(4, 64, 128, CPU)


def _config(density: float | None, execution: str = "rounded", **sizes: int) -> Any:
    return model_config(argparse.Namespace(**{**SIZES, **sizes}), density, 64, execution)


def _ours(density: float | None, execution: str = "rounded", recompute: bool = False) -> Ours:
    ours = Ours(held_decoder(_config(density, execution), CPU, torch.float32, recompute))
    ours.feed(TOKENS)
    return ours


def _peer(dense: Ours) -> Peer:
    llama, _ = held_llama(dense.config, dense.model.state_dict(), CPU, torch.float32)
    peer = Peer(llama, dense.config)
    peer.feed(TOKENS)
    return peer


@pytest.mark.parametrize("training", [True, False])
def test_decisions_are_the_draws_in_training_and_in_evaluation(training: bool) -> None:
    decoder = held_decoder(_config(0.5), CPU, torch.float32).train(training)
    draw(decoder, 4, 64)
    draws = torch.stack([layer.router.draws for layer in decoder.layers])
    assert torch.equal(decoder(TOKENS).routing.executed, draws)
    assert torch.equal(decoder(TOKENS[:2, :9]).routing.executed, draws[:, :2, :9])
    assert 0.45 < float(draws.float().mean()) < 0.55
    rows = draws.flatten(0, 1).unique(dim=0)
    assert len(rows) == 3 * 4  # every site and every row draws for itself


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_exact_draws_give_every_row_its_share(density: float) -> None:
    decoder = held_decoder(_config(density), CPU, torch.float32)
    draw(decoder, 4, 64, exact_from=24)
    draws = torch.stack([layer.router.draws for layer in decoder.layers])
    assert torch.equal(draws[:, :, 24:].sum(-1), torch.full((3, 4), round(40 * density)))
    assert len(draws[:, :, 24:].flatten(0, 1).unique(dim=0)) == (1 if density == 1 else 12)
    if density == 0.5:
        assert len(draws[:, :, :24].sum(-1).unique()) > 1  # independent before


def test_a_held_router_pays_for_its_logits_and_their_gradient() -> None:
    ours = _ours(0.5)
    ours.loss().backward()
    for name, parameter in ours.model.named_parameters():
        if "router" in name:
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    routing = ours.decoder.eval()(TOKENS).routing
    assert routing.margins is not None and float(routing.margins.detach().std()) > 0


def test_density_and_flops_are_the_record_of_what_ran() -> None:
    ours = _ours(0.25)
    ours.step()
    draws = torch.stack([m.draws for m in ours.model.modules() if isinstance(m, HeldRouter)])
    sees = torch.arange(1, 65)
    executed, attended = draws.sum((1, 2)).tolist(), (draws * sees).sum((1, 2)).tolist()
    counts = Routed(256, 4 * float(sees.sum()), executed, attended, None, [0] * len(executed), [0] * len(executed))
    assert ours.counts() == counts
    assert ours.density() == pytest.approx(float(draws.float().mean()))
    assert ours.flops() == pytest.approx(
        (executed_flops(ours.config, counts), dense_flops(ours.config, 256, counts.visible_keys))
    )


def test_a_dense_model_executes_everything_and_so_does_the_peer() -> None:
    dense = _ours(None)
    peer = _peer(dense)
    dense.step()
    for contestant in (dense, peer):
        executed, bound = contestant.flops()
        assert executed == bound == dense_flops(dense.config, 256, 4 * 64 * 65 / 2)
        assert contestant.density() == 1.0


def test_the_peer_computes_the_same_and_trains() -> None:
    dense = _ours(None)
    peer = _peer(dense)
    for _ in range(3):
        before = dense.step()
        assert_same(before, peer.step(), torch.float32)
    assert dense.step() < before
    with pytest.raises(AssertionError):
        assert_same(before, before * 1.001, torch.float32)


def test_a_peer_that_does_not_compile_runs_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object) -> object:
        def call(**_: object) -> None:
            raise RuntimeError("no kernel")

        return call

    peer = _peer(_ours(None))
    monkeypatch.setattr(torch, "compile", broken)
    peer.compile_if_it_works()
    assert peer.note == "hf_llama is not compiled: torch.compile failed with RuntimeError"
    assert peer.step() > 0
    monkeypatch.setattr(torch, "compile", lambda model: model)
    peer.compile_if_it_works()
    assert peer.note == "hf_llama is compiled with torch.compile"


def test_capacity_holds_every_row_to_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []

    def ten(_: object, tokens: int, target: float) -> Capacity:
        asked.append((tokens, target))
        return Capacity(10)

    monkeypatch.setattr(RouterConfig, "capacity", ten)
    ours = _ours(0.5, "capacity")
    ours.step()
    assert asked == [(64, 0.5)]
    assert ours.counts().executed_tokens == [4 * 10] * 3  # what did not find room is not counted


def test_a_batch_of_another_shape_gets_draws_and_targets_of_its_own() -> None:
    ours = _ours(0.5)
    ours.step()
    ours.feed(TOKENS[:1, :40])
    ours.step()
    assert ours.counts().tokens == 40
    targets = torch.full((1, 40), -100)
    targets[0, 3] = 7
    ours.feed(TOKENS[:1, :40], targets)
    logits = ours.decoder(TOKENS[:1, :40], sample_ids=torch.zeros(1, dtype=torch.int64)).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 3:4], targets[0, 3:4])
    torch.testing.assert_close(ours.loss(), expected)


def test_peak_memory_holds_state_and_activations_of_this_model_alone() -> None:
    parameters = sum(p.nbytes for p in _ours(None).model.parameters())
    peaks = {}
    for name, contestant in {"dense": _ours(None), "routed": _ours(0.25), "saved": _ours(None, recompute=True)}.items():
        contestant.step()
        contestant.measure_peak()
        peaks[name] = contestant.peak_bytes
        assert contestant.peak_bytes is not None and contestant.peak_bytes > 4 * parameters  # weights, gradients, AdamW
    assert peaks["routed"] < peaks["dense"] and peaks["saved"] < peaks["dense"]


def test_a_step_under_the_profiler_finds_the_same_peak_again() -> None:
    contestant: Contestant = _ours(0.5)
    contestant.step()
    contestant.measure_peak()
    first = contestant.peak_bytes
    contestant.measure_peak()
    assert contestant.peak_bytes == first
    contestant.forget()
    assert peak_bytes(contestant.step, CPU) < first


def test_names_and_sentences() -> None:
    assert [routed_name(density) for density in (1.0, 0.5, 0.25)] == ["routed_1", "routed_0.5", "routed_0.25"]
    with pytest.raises(ValueError, match=r"^model.width \(64\) must be divisible by model.heads \(3\)"):
        _config(None, heads=3, kv_heads=1)
