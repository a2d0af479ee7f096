"""A tuned decoder and a saved adapter have the engine's own weights: what trains its fp32 masters, the rest unchanged.

``python -m tests.tune.test_load CONFIG CASES OUT`` is what the two ranks run: tune, save, and write down the
engines' weights; one start for all cases.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor

from model.decoder import Decoder
from model.init import initialise
from model.router import Gate, RoutingInputs
from tests.launching import run
from tests.trainer.checkpoints.saved_runs import SHUFFLED, rehash, save_cases
from tests.trainer.one_rank import save_now
from tests.tune.put_back import put_back
from trainer.distributed import World
from trainer.engine import build_engine, set_learning_rate
from tune import merge
from tune.adapter_files import save_adapter
from tune.adapters import prepare
from tune.config import TuneConfig
from tune.load import load_model

RANKS, STEPS = 2, 2
EARLY = ["train.precision=fp32", "adapter.kind=lora", "adapter.layers=early"]
TIED = ["model.tied_head=true", "model.router.granularity=module", "base.routers=tuned", "adapter.kind=dora"]
LORA = {f"lora-{stage}": [f"deepspeed.zero_stage={stage}", *EARLY] for stage in (0, 1, 2, 3)}
DORA = {f"dora-{stage}": [f"deepspeed.zero_stage={stage}", *TIED] for stage in (0, 1, 2, 3)}
STARVED = {
    f"starved-{stage}": [f"deepspeed.zero_stage={stage}", "train.precision=fp32", "adapter.kind=dora"]
    for stage in (0, 2, 3)
}
CASES = {
    **LORA,
    **DORA,
    **STARVED,
    "whole-3": [*DORA["dora-3"], "deepspeed.persistence_threshold=100000"],
    "shuffled-2": [*DORA["dora-2"], SHUFFLED],
    # Masters that still round to 1, as frozen norms do, at the stage whose files do not say whose they are.
    "none-0": ["adapter.kind=none", "deepspeed.zero_stage=0", "train.optimizer.lr=0.0001"],
    "none-3": ["adapter.kind=none", "deepspeed.zero_stage=3"],
    "full-0": ["adapter.kind=full", "deepspeed.zero_stage=0"],
    "full-3": ["adapter.kind=full", "deepspeed.zero_stage=3"],
    "routers-2": ["adapter.kind=none", "ensemble=null", "base.routers=tuned"],
}
SAVED = [name for name in CASES if not name.startswith("full")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run folder a case; odd sizes, so that two partitions need padding."""
    folder = tmp_path_factory.mktemp("tuned")
    config = {
        "base": {"path": "runs/nowhere"},
        "model": {
            "vocab_size": 97, "layers": 3, "width": 33, "heads": 2, "kv_heads": 1, "head_width": 6, "ffn_width": 21,
            "router": {"density": 0.5},
        },
        "ensemble": {"layers": 2, "final_weight": 0.6},
        "adapter": {"rank": 3},
        "data": {"sequence_tokens": 16, "sources": [{"name": "none", "files": ["none.jsonl"]}]},
        "train": {
            "steps": 4, "global_batch_samples": 4, "micro_batch_samples": 2, "optimizer": {"lr": 0.003},
            "precision": "bf16", "evaluation": {"samples": 5},
        },
        "deepspeed": {"persistence_threshold": 0},
    }  # fmt: skip
    (folder / "tune.yaml").write_text(yaml.safe_dump(config))
    (folder / "cases.json").write_text(json.dumps(CASES))
    arguments = [str(folder / name) for name in ("tune.yaml", "cases.json", "out")]
    done = run("tests.tune.test_load", *arguments, processes=RANKS)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder / "out"


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a case's run folder, to spoil."""
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / name))


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_the_masters_of_what_trains_and_the_base_for_the_rest(runs: Path, name: str) -> None:
    decoder, config, step, _ = load_model(runs / name, merged=False)
    expected, base = torch.load(runs / name / "expected.pt"), dict(_base(config).named_parameters())
    loaded = dict(decoder.named_parameters())
    assert loaded.keys() == expected.keys() and step == STEPS and not decoder.training
    trained = [key for key, weight in loaded.items() if weight.requires_grad]
    assert trained
    for key, weight in loaded.items():
        assert weight.dtype == torch.float32
        if name.startswith("shuffled"):  # DeepSpeed itself gives other parameters' masters
            continue
        assert torch.equal(weight, expected[key]), key
        if key in trained:
            continue
        original = base[key.replace(".base_layer", "")]
        if config.train.precision == "bf16":
            original = original.bfloat16().float()
        assert torch.equal(weight, original), key  # bit by bit
    moved = [key for key in trained if not torch.equal(loaded[key], loaded[key].bfloat16().float())]
    assert moved  # masters, not rounded on the way


def test_partitions_in_another_order_than_the_models(runs: Path) -> None:
    loaded, expected = (load_model(runs / name).decoder.state_dict() for name in ("shuffled-2", "dora-2"))
    for name, weight in loaded.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("cases", [LORA, DORA, STARVED], ids=["lora-fp32", "dora-bf16", "starved"])
def test_losses_are_the_same_at_every_stage(runs: Path, cases: dict[str, Any]) -> None:
    losses = [json.loads((runs / name / "losses.json").read_text()) for name in cases]
    tolerance = 5e-3 if cases is DORA else 1e-5
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=tolerance)
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_merged_it_is_the_same_model(runs: Path, name: str) -> None:
    merged, config, *_ = load_model(runs / name)
    apart, *_ = load_model(runs / name, merged=False)
    tokens = _tokens(0, 0)
    torch.testing.assert_close(merged(tokens).logits, apart(tokens).logits, rtol=0, atol=1e-5)
    assert merged.state_dict().keys() == _base(config).state_dict().keys()


@pytest.mark.parametrize("name", SAVED)
def test_the_saved_adapter_on_its_base_is_the_tuned_model(runs: Path, name: str) -> None:
    apart, config, *_ = load_model(runs / name, merged=False)
    decoder, expected = _base(config, ensemble=False), dict(apart.named_parameters())
    wrapper = put_back(decoder, runs / name / "adapter")
    assert (wrapper is None) == (config.adapter.kind == "none")
    low = config.train.precision == "bf16"
    for key, weight in decoder.named_parameters():
        wanted = expected[key]
        if low and config.deepspeed.zero_stage == 0:  # no masters within reach
            weight, wanted = weight.bfloat16(), wanted.bfloat16()
        elif low and not wanted.requires_grad:
            weight = weight.bfloat16().float()
        if not (name.startswith("shuffled") and wanted.requires_grad):
            assert torch.equal(weight, wanted), key
        else:
            torch.testing.assert_close(weight, wanted, rtol=0.01, atol=1e-6)
        assert not weight.requires_grad


@torch.no_grad()
def test_the_saved_adapter_is_pefts_own(runs: Path) -> None:
    apart, config, *_ = load_model(runs / "lora-3", merged=False)
    decoder = _base(config)
    PeftModel.from_pretrained(decoder, str(runs / "lora-3/adapter"))
    for name, weight in decoder.named_parameters():
        if name.startswith(("ensemble.", "norm.")):
            weight.copy_(dict(apart.named_parameters())[name])  # of which PEFT knows nothing
    tokens = _tokens(0, 0)
    assert torch.equal(decoder.eval()(tokens).logits, apart(tokens).logits)


def test_a_model_of_which_the_backbone_trained_is_not_saved_as_an_adapter(runs: Path) -> None:
    assert (runs / "none-0/adapter/ensemble.safetensors").exists()
    assert not (runs / "full-0/adapter").exists() and not (runs / "full-3/adapter").exists()


def test_a_run_of_stage_one_has_nothing_to_merge(
    two_rank_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        merge.main([str(two_rank_runs / "fp32-2"), str(tmp_path / "out")])
    assert "has no adapters to merge; give a tuning run, or use that one as it is" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dora-0", "dora-2", "none-3"])
def test_weights_that_do_not_match_the_config(copy: Callable[[str], Path], name: str) -> None:
    saved = copy(name) / "checkpoints" / f"step-{STEPS:08d}"
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["ensemble"]["layers"] = 3
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    rehash(saved, "config.yaml")
    with pytest.raises(ValueError, match=r"do not match its config.yaml \(.*ensemble.router.\w+ is \[2.* instead"):
        load_model(saved)


def _tokens(step: int, rank: int) -> Tensor:
    return torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(10 * step + rank))


def _base(config: TuneConfig, ensemble: bool = True) -> Decoder:
    """The base as every rank has it before it is prepared."""
    decoder = Decoder(config.model, seed=config.train.seed)
    initialise(decoder, config.model, config.train.seed)
    if ensemble and config.ensemble is not None:
        decoder.add_ensemble(config.ensemble)
    return decoder


def _tune_and_save(config: TuneConfig, folder: Path, world: World) -> None:
    decoder = _base(config)
    peft = prepare(decoder, config.adapter, config.base.routers, config.train.seed)
    engine = build_engine(config, world, decoder)
    losses: list[float] = []
    if folder.name.startswith("starved"):
        _starve(decoder, world, losses)
    for step in range(STEPS):
        set_learning_rate(engine, 1.0)
        tokens = _tokens(step, world.rank)
        loss = engine(tokens, tokens.roll(-1, 1)).loss.loss / tokens.numel()
        engine.backward(loss)
        engine.step()
        losses.append(float(world.all_reduce_sum(loss.detach().clone())) / world.size)
    if world.is_main:
        (folder / "checkpoints").mkdir(parents=True)
    world.barrier()
    save_now(engine, folder / "checkpoints", STEPS, {"step": STEPS}, "f" * 64, config, world)
    saved = save_adapter(peft, decoder, folder / "adapter", world)
    assert saved == (config.adapter.kind != "full")
    assert not saved or save_adapter(peft, decoder, folder / "adapter", world)  # in place of what is there
    expected = _expected(engine, config)
    if world.is_main:
        torch.save(expected, folder / "expected.pt")
        (folder / "losses.json").write_text(json.dumps(losses))
    engine.destroy()


def _starve(decoder: Decoder, world: World, losses: list[float]) -> None:
    """Layer 0 executes nothing on rank 1, and from the second step on nowhere."""
    router = decoder.layers[0].router
    decide = router.forward

    def nothing(x: Tensor, inputs: RoutingInputs) -> Gate:
        gate = decide(x, inputs)
        return gate if world.rank == 0 and not losses else Gate(gate.executed & False, gate.value * 0)

    router.forward = nothing


def _expected(engine: Any, config: TuneConfig) -> dict[str, Tensor]:
    """The engine's own weights, whole, fp32, by name: masters of what trains; collective."""
    import deepspeed

    found: dict[str, Tensor] = {}
    named = dict(engine.module.named_parameters())
    for name, parameter in named.items():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone().float()
        else:
            found[name] = parameter.detach().clone().float()
    if config.deepspeed.zero_stage == 0 and config.train.precision == "bf16":
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        master = {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}
        return found | {name: master[p].detach().clone() for name, p in named.items() if p.requires_grad}
    if config.train.precision == "bf16":
        for name, parameter in named.items():
            if parameter.requires_grad:
                found[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).reshape(found[name].shape)
    return found


if __name__ == "__main__":
    save_cases(TuneConfig, _tune_and_save)
