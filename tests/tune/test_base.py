"""A base is found wherever one can lie, and everything else is refused in one sentence that says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evals.placement import Placement
from model.budget import Budget
from model.config import EnsembleConfig, ModelConfig
from model.decoder import Decoder
from model.schedules import Progress, Ramp
from tests.evals.tiny import run_folder
from tests.model.tiny import config, decoder
from tests.ranks import Processes
from trainer.checkpoints import manifest
from trainer.checkpoints.weights_folder import write_weights
from trainer.distributed import join, leave
from tune.base import load_base, stage_two_model
from tune.config import BaseConfig


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Where :func:`write_weights` finds a tokenizer; returns a folder that does not exist yet."""
    (tmp_path / "tokenizer.model").touch()
    return tmp_path / "weights"


@pytest.fixture
def stage_one(tmp_path: Path, tiny: dict[str, Any]) -> tuple[Path, Decoder]:
    """A run folder with one checkpoint at step 7, as ZeRO stage 0 in fp32 leaves it, and what is in it."""
    tiny["deepspeed"]["zero_stage"] = 0
    model = decoder(ModelConfig.model_validate(tiny["model"]))
    checkpoint = tmp_path / "run/checkpoints/step-00000007"
    (checkpoint / "deepspeed").mkdir(parents=True)
    torch.save({"module": model.state_dict()}, checkpoint / "deepspeed/mp_rank_00_model_states.pt")
    torch.save({}, checkpoint / "trainer.pt")
    for folder in (checkpoint, tmp_path / "run"):
        (folder / "config.yaml").write_text(yaml.safe_dump(tiny))
    manifest.write(checkpoint, {"step": 7, "world_size": 1})
    return tmp_path / "run", model


def same(one: Decoder, other: Decoder) -> bool:
    """Bit by bit."""
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_a_stage_one_run_or_checkpoint(stage_one: tuple[Path, Decoder], tiny: dict[str, Any]) -> None:
    run, model = stage_one
    checkpoint = run / "checkpoints/step-00000007"
    for path in (run, str(run), checkpoint):
        base = load_base(path)
        assert same(base.decoder, model) and base.model == base.decoder.config and not base.decoder.training
        assert base.loaded.tokenizer_folder == Path(tiny["data"]["dir"])
        parameters = sum(p.numel() for p in model.parameters())
        assert base.description == (
            f"stage-one checkpoint {checkpoint}, step 7: {parameters:,} parameters, 3 layers, learned routers at "
            "density 0.5 on 3 sites"
        )
        assert base.fingerprint == hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def test_a_folder_of_weights(tmp_path: Path, weights: Path) -> None:
    model = decoder(config("dense"))
    write_weights(model, weights, tmp_path, {"source": "Hugging Face llama checkpoint x"})
    base = load_base(weights)
    assert same(base.decoder, model) and base.loaded.tokenizer_folder == weights
    assert base.description.startswith(f"Hugging Face llama checkpoint x in {weights}: ")
    assert base.description.endswith(" parameters, 3 layers, dense")
    # Other weights are another base.
    write_weights(decoder(config("dense"), seed=2), tmp_path / "other", tmp_path, {})
    assert load_base(tmp_path / "other").fingerprint != base.fingerprint
    assert load_base(tmp_path / "other").description.startswith(f"weights in {tmp_path / 'other'}: ")


def test_a_tuned_folder_is_no_base(tmp_path: Path, weights: Path) -> None:
    model = decoder(config("dense"))
    model.add_ensemble(EnsembleConfig(layers=2))
    write_weights(model, weights, tmp_path, {})
    with pytest.raises(
        ValueError, match=r"was already tuned: it has an ensemble of its last 2 layers, and a second one cannot"
    ):
        load_base(weights)


def test_what_lies_elsewhere_is_told_how_to_get_here(tmp_path: Path, stage_one: tuple[Path, Decoder]) -> None:
    with pytest.raises(ValueError, match=r"there is no folder none; give base.path a stage-one run, one of its checkp"):
        load_base("none")
    with pytest.raises(ValueError, match=rf"convert.from_hf wrote; {tmp_path} holds run$"):
        load_base(str(tmp_path / "none"))
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        ValueError, match=r"is a Hugging Face folder, not a run; import it with: python -m convert.from_hf .*/hf OUT"
    ):
        load_base(hf)
    run, _ = stage_one
    blocks = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**blocks, "base": {"path": "x"}}))
    with pytest.raises(
        ValueError, match=r"is a stage-two run, .*; merge them first with: python -m tune.merge .*/run OUT"
    ):
        load_base(run)
    (run / "config.yaml").write_text(yaml.safe_dump({**blocks, "base": {"path": "x"}, "ensemble": {"layers": 2}}))
    with pytest.raises(ValueError, match=r"is a stage-two run, .* so give base.path the model that it was tuned from"):
        load_base(run)


@pytest.mark.parametrize("content", [None, "model: [", "- a list"])
def test_a_folder_with_nothing_in_it(tmp_path: Path, content: str | None) -> None:
    """Also where its config.yaml is no config."""
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"is neither a run folder nor a whole checkpoint"):
        load_base(tmp_path)


TUNED, FROZEN = BaseConfig(path="x", routers="tuned"), BaseConfig(path="x")
ROUTER = {
    "noise": {"start": 1.0, "end": 0.25, "until": 0.6},
    "temperature": {"start": 2.0, "end": 0.5, "until": 0.9},
    "budget": {"coefficient": 0.3, "controller": "adaptive", "dense_until": 0.1, "reach_by": 0.4},
}


def test_tuned_routers_go_on_where_their_schedules_ended() -> None:
    before = config(**ROUTER)
    after = stage_two_model(before, TUNED)
    assert before.router is not None and after.router is not None
    assert after.router.noise == Ramp(start=0.25, end=0.25, until=1.0)
    assert after.router.temperature == Ramp(start=0.5, end=0.5, until=1.0)
    assert (after.router.budget.dense_until, after.router.budget.reach_by) == (0, 0)
    assert (after.router.budget.coefficient, after.router.budget.controller) == (0.3, "adaptive")
    # Nothing else is another; and doing it twice changes nothing.
    untouched = {"noise": before.router.noise, "temperature": before.router.temperature, "budget": before.router.budget}
    assert after.model_copy(update={"router": after.router.model_copy(update=untouched)}) == before
    assert stage_two_model(after, TUNED) == after == ModelConfig.model_validate(after.model_dump())


def test_tuned_routers_come_down_to_another_density() -> None:
    ramp = {"dense_until_step": 3, "reach_by_step": 10}
    base = BaseConfig.model_validate({"path": "x", "routers": "tuned", "density": 0.3, "ramp": ramp})
    after = stage_two_model(config(**ROUTER), base)
    assert after.router is not None and after.router.density == 0.3
    budget = Budget(after, 33)
    asked = [budget.target(Progress(step, 20)) for step in (0, 3, 6.5, 10, 20)]
    assert asked == pytest.approx([1.0, 1.0, 0.65, 0.3, 0.3])


def test_frozen_routers_drop_nothing() -> None:
    for frozen, execution in (("frozen", "rounded"), ("tuned", "capacity")):
        after = stage_two_model(config(execution="capacity"), BaseConfig(path="x", routers=frozen))  # type: ignore[arg-type]
        assert after.router is not None and after.router.execution == execution


def test_frozen_routers_do_not_explore() -> None:
    for routers, explore in (("frozen", 0.0), ("tuned", 0.2)):
        after = stage_two_model(config(explore=0.2), BaseConfig(path="x", routers=routers))  # type: ignore[arg-type]
        assert after.router is not None and after.router.explore == explore


def test_frozen_routers_pay_no_price() -> None:
    after = stage_two_model(config(**ROUTER), FROZEN)
    assert after.router is not None and after.router.noise == Ramp(start=0.0, end=0.0, until=1.0)
    assert (after.router.budget.coefficient, after.router.budget.controller) == (0, "fixed")


def test_dense_models_and_routers_that_look_ahead() -> None:
    assert stage_two_model(config("dense"), FROZEN) == config("dense")
    with pytest.raises(
        ValueError, match=r"router.kind expert_choice picks tokens by looking at later ones, so a response"
    ):
        stage_two_model(config("expert_choice"), FROZEN)


def test_all_ranks_start_from_the_checkpoint_that_rank_0_finds(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1's file system shows the newest one late."""
    checkpoints = run_folder(tmp_path / "run", tiny) / "checkpoints"
    newest = shutil.copytree(checkpoints / "step-00000007", checkpoints / "step-00000008")
    (newest / manifest.NAME).unlink()
    manifest.write(newest, {"step": 8, "world_size": 1})
    with Processes(_describe, tmp_path, count=2, first=_late_on_rank_1) as ranks:
        assert ranks.end() == [0, 0], ranks.output
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and "step-00000008, step 8: " in told[0]


def _late_on_rank_1() -> None:
    listed = manifest.newest_first
    if os.environ["RANK"] == "1":
        manifest.newest_first = lambda folder: listed(folder)[1:]


def _describe(folder: Path) -> None:
    world = join(60.0)
    base = load_base(folder / "run", world)
    opened = Placement(world, "fp32").load(folder / "run")
    (folder / f"{world.rank}.txt").write_text(f"{base.description} {base.fingerprint} {opened.source}")
    leave()
