"""What trains, that adapters start as nothing, and that all that the model does goes on working around them.

Dimension letters: B batch, T tokens, S routed sites, I inputs of a projection.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import EnsembleConfig
from model.decoder import Decoder
from model.flops import Trained
from model.generate import generate
from tests.model import tiny
from tests.model.test_decoding import in_chunks
from tune.adapters import counts_by_part, merge, part_of, prepare, trainable_counts
from tune.config import AdapterConfig, TuneConfig

ENSEMBLE = EnsembleConfig(layers=2, final_weight=0.6)
kinds = pytest.mark.parametrize("kind", ["lora", "dora"])
granular = pytest.mark.parametrize("granularity", ["layer", "module"])


def tuned(
    kind: str,
    router: str = "learned",
    *,
    ensemble: bool = True,
    moved: bool = True,
    recompute: bool = False,
    **more: Any,
) -> Decoder:
    """A tiny decoder, prepared; ``moved``: as after some steps. ``more``: fields of the router and of the adapter."""
    adapter = {name: more.pop(name) for name in ("layers", "rank", "targets", "dropout", "final_norm") if name in more}
    routers = more.pop("routers", "frozen")
    decoder = tiny.decoder(tiny.config(router, **more), recompute=recompute)
    if ensemble:
        decoder.add_ensemble(ENSEMBLE)
    prepare(decoder, AdapterConfig(kind=kind, **adapter), routers, seed=3)
    if moved:
        generator = torch.Generator().manual_seed(5)
        for name, parameter in decoder.named_parameters():
            if ".lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return decoder


def losses(decoder: Decoder, **inputs: Any) -> Tensor:
    output = decoder(tiny.random_tokens(), tiny.random_targets(), **inputs)
    return output.loss.loss


@pytest.mark.parametrize("kind", ["full", "none", "lora", "dora"])
@pytest.mark.parametrize("routers", ["frozen", "tuned"])
@pytest.mark.parametrize("ensemble", [True, False])
@granular
def test_what_trains(kind: str, routers: str, ensemble: bool, granularity: str) -> None:
    decoder = tuned(kind, ensemble=ensemble, routers=routers, granularity=granularity)
    trains: dict[str, set[bool]] = {}
    for name, parameter in decoder.named_parameters():
        trains.setdefault(part_of(name), set()).add(parameter.requires_grad)
    expected = {"backbone": {kind == "full"}, "routers": {routers == "tuned"}}
    expected |= {"norm": {ensemble or kind == "full"}}
    expected |= {"ensemble": {True}} if ensemble else {}
    expected |= {"adapters": {True}} if kind in ("lora", "dora") else {}
    assert trains == expected
    counts = counts_by_part(decoder)
    sizes = [(p.numel() * p.requires_grad, p.numel()) for p in decoder.parameters()]
    assert trainable_counts(decoder) == tuple(map(sum, zip(*sizes, strict=True)))
    assert counts["routers"][1] == 2 * 64 * len(decoder.config.sites) and counts.keys() == expected.keys()
    if ensemble:
        assert counts["ensemble"] == (64 + 2 * 64 + 2,) * 2  # a norm, a router of two layers


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("full", "all"), ("none", "all"), ("dora", "all"), *(("lora", x) for x in ("all", "early", "late"))],
)
@pytest.mark.parametrize("routers", ["frozen", "tuned"])
def test_flops_are_counted_by_what_trains(kind: str, routers: str, layers: str) -> None:
    decoder = tuned(kind, routers=routers, layers=layers, always_on_first=1)
    written = {
        "base": {"path": "base", "routers": routers},
        "model": decoder.config.model_dump(),
        "ensemble": ENSEMBLE.model_dump(),
        "adapter": {"kind": kind, "layers": layers},
        "data": {"sequence_tokens": 8, "sources": [{"name": "toy", "files": ["toy.jsonl"]}]},
        "train": {"steps": 1, "global_batch_samples": 1, "micro_batch_samples": 1},
    }
    trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    first = min([int(name.split(".")[1]) for name in trained if name.startswith("layers.")], default=3)
    matrices = any(part_of(name) == "backbone" for name in trained)
    assert TuneConfig.model_validate(written).trained == Trained(matrices, first)


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_the_final_norm_can_train_without_an_ensemble(kind: str) -> None:
    decoder = tuned(kind, ensemble=False, final_norm=True)
    assert decoder.norm.weight.requires_grad and not decoder.layers[0].input_layernorm.weight.requires_grad


def test_counts_are_those_of_whole_parameters_where_zero_has_partitioned_them() -> None:
    decoder = tuned("none")
    expected = trainable_counts(decoder)
    for parameter in decoder.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert trainable_counts(decoder) == expected


@kinds
def test_adapters_are_where_the_config_says(kind: str) -> None:
    decoder = tuned(kind, targets=["q_proj", "down_proj"], layers="early", rank=5)
    found = {name.split(".lora_")[0] for name, p in decoder.named_parameters() if ".lora_" in name}
    assert found == {"layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"}  # layers 1 and 2 are the ensemble's
    assert decoder.layers[0].self_attn.q_proj.lora_A["default"].weight.shape == (5, 64)
    late = {n for n, _ in tuned(kind, targets=["q_proj"], layers="late").named_parameters() if ".lora_A" in n}
    assert late == {f"layers.{layer}.self_attn.q_proj.lora_A.default.weight" for layer in (1, 2)}
    everywhere = {n.split(".lora_")[0] for n, p in tuned(kind).named_parameters() if ".lora_" in n}
    assert len(everywhere) == 3 * 7 and not any("head" in name or "embed" in name for name in everywhere)


@kinds
def test_first_values_depend_on_the_seed_and_the_name_alone(kind: str) -> None:
    def first(seed: int, **adapter: Any) -> dict[str, Tensor]:
        decoder = tiny.decoder(tiny.config())
        prepare(decoder, AdapterConfig(kind=kind, **adapter), "frozen", seed)
        return {name: p.detach() for name, p in decoder.named_parameters() if ".lora_" in name}

    torch.manual_seed(0)
    one = first(1)
    torch.manual_seed(7)
    again, other, fewer = first(1), first(2), first(1, targets=["up_proj"])
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(torch.equal(one[name], fewer[name]) for name in fewer)
    for name, values in one.items():
        if ".lora_A." in name:
            assert not torch.equal(values, other[name])
            bound = 1 / math.sqrt(values.shape[1])
            assert 0.9 * bound < float(values.abs().max()) <= bound
        if ".lora_B." in name:
            assert not values.any()


@kinds
def test_step_zero_is_the_base_model(kind: str) -> None:
    base = tiny.decoder(tiny.config()).eval()
    decoder = tuned(kind, ensemble=False, moved=False).eval()
    tokens = tiny.random_tokens()
    tiny.assert_close(decoder(tokens).logits, base(tokens).logits)


@kinds
@granular
@pytest.mark.parametrize("routers", ["frozen", "tuned"])
@pytest.mark.parametrize("executed", ["some", "none"])
def test_every_trained_parameter_has_a_gradient_and_no_other(
    kind: str, granularity: str, routers: str, executed: str
) -> None:
    """Without one ZeRO hangs, or applies the last step's again."""
    decoder = tuned(kind, granularity=granularity, routers=routers)
    if executed == "none":
        shape = (len(decoder.config.sites), *tiny.random_tokens().shape)
        tiny.force(decoder, torch.zeros(shape, dtype=torch.bool))
    losses(decoder).backward()
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if executed == "none" and ".lora_" in name:
            assert not parameter.grad.any()
        elif ".lora_" in name:
            assert parameter.grad.any()


@kinds
@granular
def test_gradients_are_those_of_computing_every_token(kind: str, granularity: str) -> None:
    """The rows that attention does not keep, but gathers again, are gathered for the adapters, too."""
    sparse = tuned(kind, granularity=granularity)
    dense = tuned(kind, granularity=granularity, execution="reference")
    for decoder in (sparse, dense):
        losses(decoder).backward()
    for (name, one), (_, other) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
        if one.requires_grad:
            tiny.assert_close(one.grad, other.grad, 1e-4)
            assert one.grad.any(), name


@kinds
def test_recomputing_changes_nothing(kind: str) -> None:
    kept, recomputed = tuned(kind), tuned(kind, recompute=True)
    for decoder in (kept, recomputed):
        losses(decoder).backward()
    for one, other in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@kinds
@pytest.mark.parametrize("chunks", [[tiny.LENGTH], [14, 1, 18], [1] * tiny.LENGTH], ids=["prefill", "some", "each"])
def test_the_cache_agrees_with_a_full_pass(kind: str, chunks: list[int]) -> None:
    decoder, tokens = tuned(kind).eval(), tiny.random_tokens()
    parts = in_chunks(decoder, tokens, chunks, None, None)
    tiny.assert_close(torch.cat([part.logits for part in parts], dim=1), decoder(tokens).logits)


@pytest.mark.parametrize("kind", ["lora", "dora", "none", "full"])
@pytest.mark.parametrize("variant", ["gqa", "mqa-tied-wide-head"])
def test_merged_it_is_a_plain_decoder_with_the_same_logits(kind: str, variant: str) -> None:
    decoder = tuned(kind, variant=variant).eval()
    tokens = tiny.random_tokens()
    before = decoder(tokens).logits
    merge(decoder)
    tiny.assert_close(decoder(tokens).logits, before)
    plain = tiny.decoder(tiny.config(variant=variant))
    plain.add_ensemble(ENSEMBLE)
    assert decoder.state_dict().keys() == plain.state_dict().keys()
    assert not any("peft" in type(module).__module__ for module in decoder.modules())
    assert vars(decoder).keys() == vars(plain).keys()
    assert generate(decoder, tokens[:1, :5], 4).shape[0] == 1
    prepare(decoder, AdapterConfig(kind="lora"), "frozen", seed=0)  # and can be tuned again


def test_adapters_that_are_not_finite_are_not_merged() -> None:
    decoder = tuned("lora")
    decoder.layers[0].mlp.up_proj.lora_B["default"].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        merge(decoder)


@pytest.mark.parametrize("projection", ["self_attn.o_proj", "mlp.down_proj", "self_attn.v_proj"])
def test_dora_on_a_row_without_a_length_is_refused_and_lora_is_not(projection: str) -> None:
    """As padded heads and block expansion leave them, and rows that fp16 rounds to nothing."""
    for value in (0.0, 1e-9):
        decoder = tiny.decoder(tiny.config("dense"))
        decoder.get_submodule(f"layers.1.{projection}").weight.data[[2, 5]] = value
        targets = [projection.rpartition(".")[2]]
        with pytest.raises(
            ValueError,
            match=rf"2 of the \d+ rows of .*layers.1.{projection}.weight are zero, such as row 2; set adapter.kind",
        ):
            prepare(decoder, AdapterConfig(kind="dora", targets=targets), "frozen", seed=3)
    decoder = tiny.decoder(tiny.config("dense"))
    decoder.get_submodule(f"layers.1.{projection}").weight.data[[2, 5]] = 0
    prepare(decoder, AdapterConfig(kind="lora", targets=targets), "frozen", seed=3)
    assert losses(decoder).isfinite()
    decoder = tiny.decoder(tiny.config("dense"))
    decoder.get_submodule(f"layers.1.{projection}").weight.data[[2, 5]] = 0
    others = sorted({"q_proj", "k_proj", "up_proj"} - set(targets))
    prepare(decoder, AdapterConfig(kind="dora", targets=others), "frozen", seed=3)  # as the message says
    assert losses(decoder).isfinite()
