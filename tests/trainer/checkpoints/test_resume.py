"""Checkpoints: what is picked up, what is passed over, what is refused, what comes back."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.one_rank import engine_for, save_now, take_steps, weights
from trainer import git_state
from trainer.checkpoints import manifest, resume
from trainer.checkpoints.retention import prune
from trainer.config import PretrainConfig
from trainer.config_blocks import CheckpointConfig
from trainer.distributed import World

Configure = Callable[..., PretrainConfig]
FINGERPRINT = "f" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoints"
    made.mkdir()
    return made


def fake(folder: Path, step: int) -> Path:
    """A whole checkpoint with one file in it, as far as ``find`` can tell."""
    made = folder / f"step-{step:08d}"
    (made / "deepspeed").mkdir(parents=True)
    (made / "deepspeed" / "weights.pt").write_bytes(b"weights of step %d" % step)
    manifest.write(made, {})
    return made


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


TEARS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: (p / "deepspeed/weights.pt").unlink(), "deepspeed/weights.pt is missing"),
    "short": (
        lambda p: (p / "deepspeed/weights.pt").write_bytes(b"w"),
        "deepspeed/weights.pt has 1 bytes instead of 17",
    ),
    "changed": (
        lambda p: (p / "deepspeed/weights.pt").write_bytes(b"weights of step 8"),
        "the contents of deepspeed/weights.pt do not match its SHA-256",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "it has no manifest.json"),
    "half a manifest": (lambda p: (p / "manifest.json").write_text('{"format": 1, "fi'), "cannot be read"),
    "not an object": (lambda p: (p / "manifest.json").write_text("[]"), "cannot be read"),
    "no files": (lambda p: (p / "manifest.json").write_text('{"format": 1}'), "cannot be read ('files')"),
    "no format": (lambda p: (p / "manifest.json").write_text('{"files": {}}'), "cannot be read ('format')"),
    "other format": (
        lambda p: (p / "manifest.json").write_text('{"format": 99, "files": {}}'),
        "its format is 99, but this version reads 1",
    ),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_told_and_the_one_before_taken(folder: Path, world: World, tear: str) -> None:
    older, newest = fake(folder, 8), fake(folder, 9)
    assert manifest.newest_whole(folder, world) == (newest, [])
    damage, sentence = TEARS[tear]
    damage(newest)
    found, torn = manifest.newest_whole(folder, world)
    assert found == older
    assert len(torn) == 1 and torn[0].startswith("step-00000009 is torn: ") and sentence in torn[0]


def test_the_newest_is_the_highest_step_and_partial_ones_do_not_count(folder: Path, world: World) -> None:
    for step in (9, 99_999_999, 100_000_000):  # as text the second is the largest
        fake(folder, step)
    (folder / "step-00000011.partial").mkdir()
    (folder / "step-notes").mkdir()
    found, torn = manifest.newest_whole(folder, world)
    assert found == folder / "step-100000000"
    assert torn == ["step-00000011.partial was never finished"]


@pytest.mark.parametrize("setting", ["never", "auto", "required"])
def test_what_a_start_does_with_what_is_there(
    folder: Path, world: World, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def start() -> Path | None:
        return resume.find_checkpoint(folder, setting, world)

    if setting == "required":
        with pytest.raises(ValueError, match=r"there is no checkpoint; check train\.run_dir"):
            start()
    else:
        assert start() is None
    (folder / "step-00000004.partial").mkdir()
    if setting != "required":
        assert start() is None  # a kill in the first save left nothing that could be lost
        capsys.readouterr()
    whole = fake(folder, 3)
    if setting == "never":
        with pytest.raises(ValueError, match=r"already holds step-00000003; set train\.checkpoint\.resume=auto"):
            start()
        return
    assert start() == whole
    assert "skipped: step-00000004.partial was never finished" in capsys.readouterr().err
    (whole / "deepspeed/weights.pt").unlink()
    with pytest.raises(ValueError, match="none of step-00000003 is whole"):
        start()


def test_a_checkpoint_that_the_disk_does_not_give_back_is_passed_over(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fake(folder, 10), fake(folder, 20)
    read = manifest.sha256_of

    def broken(path: Path) -> str:
        if second in path.parents:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(manifest, "sha256_of", broken)
    found, torn = manifest.newest_whole(folder, world)
    assert found == first and len(torn) == 1 and "cannot be read (Input/output error)" in torn[0]


def test_prune_keeps_the_newest_and_the_milestones(folder: Path, world: World) -> None:
    for step in range(10, 80, 10):
        fake(folder, step)
    config = CheckpointConfig.model_validate({"keep": 2, "keep_every_steps": 30})
    newest = folder / "step-00000070"
    prune(folder, newest, config)
    assert _names(folder) == [f"step-{step:08d}" for step in (30, 60, 70)]
    prune(folder, newest, CheckpointConfig.model_validate({"keep": 1}))
    assert _names(folder) == ["step-00000070"]


def test_prune_does_not_count_what_a_run_went_back_behind(folder: Path, world: World) -> None:
    """Steps 50 and 60 are torn and were passed over; 20 is what the run was resumed from, 30 what it has just saved."""
    for step in (10, 20, 30, 50, 60):
        fake(folder, step)
    prune(folder, folder / "step-00000030", CheckpointConfig.model_validate({"keep": 2}))
    assert _names(folder) == [f"step-{step:08d}" for step in (20, 30, 50, 60)]


def test_a_kill_during_the_removal_leaves_nothing_that_looks_whole(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        fake(folder, step)

    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(folder, folder / "step-00000002", CheckpointConfig.model_validate({"keep": 1}))
    assert _names(folder) == ["step-00000001.removed", "step-00000002"]
    assert manifest.newest_whole(folder, world) == (folder / "step-00000002", [])


def _save(engine: Any, folder: Path, step: int, config: PretrainConfig, world: World) -> Path:
    return save_now(engine, folder, step, {"step": step, "note": [1.5, "x"]}, FINGERPRINT, config, world)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_save_and_load_put_everything_back(
    configure: Configure, world: World, folder: Path, stage: int, precision: str
) -> None:
    """Training on from a load into a fresh engine is training on, to the bit; so weights and moments came back."""
    config = configure(f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.steps=6")
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 2)
        saved = _save(engine, folder, 2, config, world)
        straight = [r.tally.loss for r in take_steps(engine, config, world, 3, first=2)]
    written = json.loads((saved / "manifest.json").read_text())
    assert {k: v for k, v in written.items() if k != "files"} == {
        "format": 1, "step": 2, "world_size": 1, "zero_stage": stage, "precision": precision, "optimizer": "adamw",
        "seed": 0, "data_fingerprint": FINGERPRINT, "init": None, "commit": git_state.commit(),
    }  # fmt: skip
    on_disk = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert set(written["files"]) == on_disk - {"manifest.json"}
    assert {"trainer.pt", "rng-00000.pt", "config.yaml"} < on_disk
    with engine_for(config, world) as engine:
        assert resume.load(engine, saved, FINGERPRINT, config, world) == ({"step": 2, "note": [1.5, "x"]}, "")
        assert [r.tally.loss for r in take_steps(engine, config, world, 3, first=2)] == straight


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimisers_settings_are_the_configs_not_the_checkpoints(
    configure: Configure, world: World, folder: Path, stage: int, precision: str
) -> None:
    """Resuming at a lower rate is what a run that went bad is told to do."""
    config = configure(f"deepspeed.zero_stage={stage}", f"train.precision={precision}")
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        saved = _save(engine, folder, 1, config, world)
    lower = configure(
        "train.optimizer.lr=0.0001", "train.optimizer.weight_decay=0.02", "train.optimizer.betas=[0.8,0.9]"
    )
    with engine_for(lower, world) as engine:
        resume.load(engine, saved, FINGERPRINT, lower, world)
        groups = engine.optimizer.param_groups
        assert [g["peak_lr"] for g in groups] == [0.0001] * 3
        assert [g["weight_decay"] for g in groups] == [0.02, 0.0, 0.0]
        assert [tuple(g["betas"]) for g in groups] == [(0.8, 0.9)] * 3


def test_random_generators_go_on_where_they_were(configure: Configure, world: World, folder: Path) -> None:
    def draws() -> list[Any]:
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()]
        return [*numbers, torch.rand(3).tolist(), torch.randn(1).item()]

    config = configure()
    with engine_for(config, world) as engine:
        draws()  # an odd number of gaussians: each library keeps the second of a pair for later
        saved = _save(engine, folder, 1, config, world)
        expected = draws()
        assert draws() != expected
        resume.load(engine, saved, FINGERPRINT, config, world)
        assert draws() == expected


MISFITS = [
    (["train.seed=3"], {}, "seed 0 there, 3 here); resume it with the same optimizer and seed"),
    (["train.optimizer.kind=muon", "train.clip_norm=0"], {}, "optimizer adamw there, muon here"),
    ([], {"fingerprint": "0" * 64}, "its data fingerprint is ffffffffffff, this config's is 000000000000"),
    (["model.ffn_width=64"], {}, "holds a different model (model.ffn_width 48 there, 64 here)"),
    (["model.layers=2", "model.tied_head=true"], {}, "model.layers 3 there, 2 here; model.tied_head False there, True"),
    (["model.router.granularity=module"], {}, "router granularity layer there, module here"),
    (["model.router=null"], {}, "model.router set there, null here"),
    (["model.router.always_on_first=1"], {}, "router always_on_first 0 there, 1 here"),
    (["model.router.input=raw"], {}, "router input normed there, raw here"),
    (["model.router.kind=random"], {}, "router kind learned there, random here"),
]


@pytest.fixture
def saved(configure: Configure, world: World, folder: Path) -> Path:
    """A checkpoint of the tiny run after one step."""
    config = configure()
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        return _save(engine, folder, 1, config, world)


@pytest.mark.parametrize(("overrides", "other", "sentence"), MISFITS)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    configure: Configure, world: World, saved: Path, overrides: list[str], other: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as error:
        resume.load(None, saved, other.get("fingerprint", FINGERPRINT), configure(*overrides), world)
    assert sentence in str(error.value) and str(saved) in str(error.value)


def test_a_run_of_the_other_stage_is_told_apart(configure: Configure, world: World, saved: Path) -> None:
    path = saved / "config.yaml"
    path.write_text(path.read_text() + "base: {path: runs/base}\n")
    with pytest.raises(ValueError, match=r"was written by tune.train, but this is pretrain.train; give each"):
        resume.load(None, saved, "0" * 64, configure(), world)


def test_what_may_change_on_the_way_is_not_refused(configure: Configure, world: World, saved: Path) -> None:
    allowed = [
        "model.router.density=0.4",
        "model.router.budget.coefficient=0.2",
        "train.steps=9",
        "train.log.images=false",
    ]
    config = configure(*allowed, "train.micro_batch_samples=4")
    with engine_for(config, world) as engine:
        assert resume.load(engine, saved, FINGERPRINT, config, world)[0]["step"] == 1


@pytest.mark.quick
def test_saving_a_step_again_replaces_it(configure: Configure, world: World, saved: Path, folder: Path) -> None:
    """A run that was rewound with data.skip_ranges comes to the same steps again, with other weights."""
    config = configure()
    before = (saved / "deepspeed" / "mp_rank_00_model_states.pt").read_bytes()
    for left_by_a_kill in ("step-00000009.partial", "step-00000008.removed"):
        (folder / left_by_a_kill).mkdir()
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1, first=2)
        assert _save(engine, folder, 1, config, world) == saved
        kept = weights(engine)
    assert _names(folder) == ["step-00000001"] and manifest.newest_whole(folder, world) == (saved, [])
    assert (saved / "deepspeed" / "mp_rank_00_model_states.pt").read_bytes() != before
    with engine_for(config, world) as engine:
        resume.load(engine, saved, FINGERPRINT, config, world)
        assert all(torch.equal(weight, kept[name]) for name, weight in weights(engine).items())
