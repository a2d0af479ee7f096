"""Run by tests/model/test_sequence.py in each of P ranks: a window shared by them against the same window whole."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model import selection
from model.chunks import IGNORE_INDEX
from model.config import Capacity, EnsembleConfig
from model.decoder import Decoder, DecoderOutput
from model.router import Centres
from model.sequence import SequenceGroup, _Transfer
from tests.model.tiny import assert_close, config, decoder, documents_of, random_targets, random_tokens

LENGTH, BATCH = 48, 3


@dataclass(frozen=True)
class Case:
    """A model and how it is run; ``router`` holds the router's fields and its ``kind``."""

    router: dict[str, Any] = field(default_factory=dict)
    variant: str = "gqa"
    documents: bool = False
    capacity: Capacity | None = None
    recompute: bool = False
    round_to: int = 1
    thresholds: bool = False
    ensemble: bool = False


CASES = {
    "dense": Case({"kind": "dense"}),
    "dense, documents": Case({"kind": "dense"}, documents=True),
    "layer routers": Case({"explore": 0.2}),
    "module routers, documents": Case({"explore": 0.2, "granularity": "module"}, documents=True),
    "recomputed": Case({"explore": 0.2}, documents=True, recompute=True),
    "modules recomputed": Case({"explore": 0.2, "granularity": "module"}, recompute=True),
    "capacity": Case({"explore": 0.2}, capacity=Capacity(20, 5)),
    "capacity, documents, modules": Case(
        {"explore": 0.2, "granularity": "module"}, documents=True, capacity=Capacity(20, 5), recompute=True
    ),
    "rounded": Case({"explore": 0.2}, documents=True, round_to=8),
    "masking reference": Case({"execution": "reference"}, documents=True),
    "normed input": Case({"explore": 0.1, "input": "normed"}, variant="mha-qk-norm"),
    "random": Case({"kind": "random"}, variant="mqa-tied-wide-head", documents=True),
    "stride": Case({"kind": "stride"}),
    "thresholds": Case({"explore": 0.2, "budget": {"controller": "quantile"}}, thresholds=True),
    "ensemble": Case({"explore": 0.2}, documents=True, ensemble=True),
}


def main() -> None:
    """Every case, forward and backward; asserts."""
    dist.init_process_group("gloo")
    size = int(os.environ["WORLD_SIZE"])
    sequence = SequenceGroup(dist.get_rank(), size, dist.new_group(range(size)))
    places = sequence.positions(LENGTH // size)
    numbers = torch.arange(LENGTH)[None, :, None]
    assert torch.equal(sequence.all_gather(sequence.local_part(numbers)), numbers)
    assert torch.equal(sequence.local_part(numbers)[0, :, 0], places) and (places.diff() > 0).all()
    for name, case in CASES.items():
        selection._ROUND_TO["cpu"] = case.round_to
        try:
            _compare(case, sequence, places)
        except AssertionError as error:
            raise AssertionError(f"{name}, {size} ranks, rank {sequence.rank}: {error}") from error
    _transfers_leave_time(sequence, places)
    dist.barrier()
    dist.destroy_process_group()


def _compare(case: Case, sequence: SequenceGroup, places: Tensor) -> None:
    tokens, targets = _batch()
    documents, positions = documents_of(11, 20, LENGTH - 31, batch=BATCH) if case.documents else (None, None)
    whole, shared = _model(case), _model(case)
    expected = _run(whole, case, tokens, targets, documents, positions)
    own_positions = None if positions is None else positions[:, places]
    found = _run(shared, case, tokens[:, places], targets[:, places], documents, own_positions, sequence)

    assert torch.equal(found.routing.executed, expected.routing.executed[..., places])
    for count in ("executed_tokens", "attended_keys", "explored_tokens", "explored_keys", "overflow_tokens"):
        assert torch.equal(_summed(getattr(found.routing, count)), getattr(expected.routing, count)), count
    assert torch.equal(_summed(found.routing.visible_keys), expected.routing.visible_keys)
    if case.capacity is not None:
        assert expected.routing.overflow_tokens.sum() > 0 < expected.routing.explored_tokens.sum()
    assert found.loss is not None and expected.loss is not None
    own = found.loss.token_nll.view(BATCH, -1)
    assert_close(own, expected.loss.token_nll.view(BATCH, LENGTH)[:, places])
    if case.thresholds:
        assert_close(_summed(found.routing.margin_sums), expected.routing.margin_sums)
        assert_close(_summed(found.routing.input_sums), expected.routing.input_sums)

    price = torch.linspace(0.1, 2.0, len(expected.routing.density)) * (targets != IGNORE_INDEX).sum()
    (expected.loss.loss + (price * expected.routing.density).sum()).backward()
    (found.loss.loss + (price * found.routing.density).sum() / sequence.size).backward()
    reference = dict(whole.named_parameters())
    moved = 0
    for name, parameter in shared.named_parameters():
        assert parameter.grad is not None, name
        assert_close(_summed(parameter.grad), reference[name].grad)
        moved += bool(parameter.grad.any())
    assert moved > 0.8 * len(reference)


def _transfers_leave_time(sequence: SequenceGroup, places: Tensor) -> None:
    """Router and queries are computed between asking for keys and values and waiting for them, and so backward."""
    case = Case({"explore": 0.0})
    model, told = _model(case), list[str]()
    begin, end = _Transfer.begin, _Transfer.end

    def note(word: str) -> Any:
        return lambda *_: told.append(word)

    for layer in model.layers:
        for module, word in ((layer.router, "router"), (layer.self_attn.q_proj, "queries")):
            module.register_forward_hook(note(word))
        layer.self_attn.q_proj.weight.register_hook(note("of queries"))
        layer.self_attn.k_proj.weight.register_hook(note("of keys"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Transfer, "begin", lambda *args: (told.append("asked"), begin(*args)))
        patch.setattr(_Transfer, "end", lambda *args: (told.append("arrived"), end(*args)))
        output = _run(model, case, *(x[:, places] for x in _batch()), None, None, sequence)
        layers = len(model.layers)
        assert told == ["asked", "router", "queries", "arrived"] * layers, told
        told.clear()
        assert output.loss is not None
        output.loss.loss.backward()
    assert told == ["asked", "of queries", "arrived", "of keys"] * layers, told


def _batch() -> tuple[Tensor, Tensor]:
    return random_tokens(BATCH, LENGTH), random_targets(BATCH, LENGTH)


def _model(case: Case) -> Decoder:
    model = decoder(config(variant=case.variant, **case.router), recompute=case.recompute)
    if case.ensemble:
        model.add_ensemble(EnsembleConfig.model_validate({"layers": 2, "distillation": 0.5}))
    sites = len(model.config.sites)
    if case.thresholds:
        model.thresholds = torch.linspace(-0.3, 0.3, sites)
        inputs = torch.linspace(-0.1, 0.1, sites * model.config.width).view(sites, -1)
        model.centres = Centres(torch.linspace(-0.2, 0.2, sites), inputs)
    return model.train()


def _run(
    model: Decoder,
    case: Case,
    tokens: Tensor,
    targets: Tensor,
    documents: Tensor | None,
    positions: Tensor | None,
    sequence: SequenceGroup | None = None,
) -> DecoderOutput:
    output: DecoderOutput = model(
        tokens,
        targets,
        sample_ids=torch.tensor([3, 11, 7]),
        documents=documents,
        positions=positions,
        noise_scale=0.7,
        z_coefficient=1e-3,
        capacity=case.capacity,
        sequence=sequence,
    )
    return output


def _summed(x: Tensor) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total)
    return total
