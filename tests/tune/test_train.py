"""Stage two as a whole: every method, stage and number of ranks; bitwise resume; nothing frozen moves."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file as load_tensors

from model.decoder import Decoder
from settings.load import _apply_override, peek
from tests.launching import run
from tests.logged import figures_of
from trainer.checkpoints import manifest
from trainer.checkpoints.layout import CONFIG
from trainer.checkpoints.resume import _check_fit
from trainer.checkpoints.save import conditions
from trainer.distributed import ALONE
from tune.base import load_base
from tune.config import TuneFile
from tune.load import load_model
from tune.resolve import resolve

pytestmark = pytest.mark.timeout(1800)  # the first test of all waits for every run

METHODS = {
    "lora": ["adapter.kind=lora"],
    "dora": ["adapter.kind=dora"],
    "early": ["adapter.kind=lora", "adapter.layers=early"],
    "none": ["adapter.kind=none"],
    "full": ["adapter.kind=full"],
}
STAGES = (0, 1, 2, 3)
ONE_RANK = {
    **{name: [*method, "deepspeed.zero_stage=0"] for name, method in METHODS.items()},
    "lora-alone": ["adapter.kind=lora", "ensemble=null"],
    "dora-alone": ["adapter.kind=dora", "ensemble=null"],
    "full-alone": ["adapter.kind=full", "ensemble=null"],
    "as-the-base": ["ensemble.final_weight=1.0", "ensemble.distillation=0.0", "ensemble.open_by=0"],
    "one-window": ["data.pack=false", "train.steps=2"],
    "routers-tuned": ["base.routers=tuned", "train.optimizer.router_lr_ratio=3.0"],
    "balanced": ["ensemble.layers=3", "ensemble.balance=0.5", "ensemble.top=2"],
    "recomputed": ["train.activation_checkpointing=true"],
    "dropped": ["adapter.dropout=0.2", "deepspeed.zero_stage=2"],
}
TWO_RANKS = {
    **{f"{name}-{stage}": [*METHODS[name], f"deepspeed.zero_stage={stage}"] for name in ("lora",) for stage in STAGES},
    **{f"{name}-3": [*METHODS[name], "deepspeed.zero_stage=3"] for name in ("dora", "early", "none", "full")},
    "lora-shared": [*METHODS["lora"], "deepspeed.zero_stage=3", "deepspeed.sequence_parallel=2"],
    "full-shared": [*METHODS["full"], "deepspeed.zero_stage=1", "deepspeed.sequence_parallel=2"],
    "bf16-2": ["train.precision=bf16"],
    "bf16-3": ["train.precision=bf16", "deepspeed.zero_stage=3"],
    "dropped-3": ["adapter.dropout=0.2", "ensemble.balance=0.5", "deepspeed.zero_stage=3"],
}
LAST_STEP_ONLY = ["train.evaluation.every_steps=4", "train.checkpoint.every_steps=4"]
GONE_ON_FROM = ("lora", "lora-3", "dropped", "dropped-3")
"""Read at step 2, too."""


@pytest.fixture(scope="module")
def runs(tuning: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folders by number of ranks and name: ``1/lora``, ``2/lora-3``."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "tune.yaml"
    config.write_text(yaml.safe_dump(tuning))
    for ranks, cases in ((1, ONE_RANK), (2, TWO_RANKS)):
        listed = folder / f"{ranks}.json"
        overrides = [
            [*own, *([] if name in GONE_ON_FROM else LAST_STEP_ONLY), f"train.run_dir={folder}/{ranks}/{name}"]
            for name, own in cases.items()
        ]
        listed.write_text(json.dumps(overrides))
        done = run("tests.tune.runs_worker", str(config), str(listed), processes=ranks, timeout_s=1500)
        assert done.returncode == 0, done.stdout[-4000:]
    return lambda name: folder / name


def losses(folder: Path) -> list[float]:
    steps = figures_of(folder)
    return [steps[step]["train/loss"] for step in sorted(steps) if step]


def weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    return dict(decoder.state_dict())


@pytest.mark.parametrize("name", ONE_RANK)
def test_every_method_trains_and_is_evaluated(runs: Callable[[str], Path], name: str) -> None:
    steps = figures_of(runs(f"1/{name}"))
    last = max(steps)
    assert sorted(steps) == list(range(last + 1))
    if name != "none":  # a frozen backbone of four training steps has little to vote on
        assert steps[last]["validation/parity/loss"] < steps[0]["validation/parity/loss"]
    assert {f"test/parity/choice_accuracy/layer-0{n}" for n in ([3] if "alone" in name else [2, 3])} <= set(steps[last])
    assert ("ensemble/weight/layer-02" in steps[1]) == ("alone" not in name)
    assert steps[last]["validation/parity/loss"] == pytest.approx(
        steps[last][f"validation/parity/loss/{'layer-03' if 'alone' in name else 'ensemble'}"], rel=1e-5
    )
    assert 0 < steps[0]["parameters/trained"] <= steps[0]["parameters/total"]


def test_at_step_0_the_loss_is_the_base_models(runs: Callable[[str], Path]) -> None:
    base = figures_of(runs("1/lora-alone"))[0]["validation/parity/loss"]
    for name in ("lora", "dora", "early", "none", "full", "as-the-base"):
        for kind in ("loss", "loss/ensemble"):
            assert figures_of(runs(f"1/{name}"))[0][f"validation/parity/{kind}"] == pytest.approx(base, abs=1e-5), name
    assert figures_of(runs("1/dora-alone"))[0]["validation/parity/loss"] == pytest.approx(base, abs=1e-5)
    assert figures_of(runs("1/lora"))[0]["validation/parity/loss/layer-03"] == pytest.approx(base, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if name.split("-")[0] in METHODS])
def test_ranks_and_stages_agree(runs: Callable[[str], Path], name: str) -> None:
    one, other = runs(f"1/{name.split('-')[0]}"), runs(f"2/{name}")
    assert losses(other) == pytest.approx(losses(one), rel=2e-5)
    last = figures_of(one)[4]
    for figure, value in figures_of(other)[4].items():
        if figure.startswith(("validation/", "ensemble/weight", "test/")):
            assert value == pytest.approx(last[figure], rel=1e-3, abs=1e-5), figure


def test_bf16_agrees_between_stages(runs: Callable[[str], Path]) -> None:
    assert losses(runs("2/bf16-3")) == pytest.approx(losses(runs("2/bf16-2")), rel=2e-2)


def test_activation_checkpointing_and_packing_change_nothing(runs: Callable[[str], Path]) -> None:
    assert losses(runs("1/recomputed")) == pytest.approx(losses(runs("1/lora")), rel=1e-6)
    packed, apart = (figures_of(runs(f"1/{name}"))[0] for name in ("lora", "one-window"))
    assert packed["validation/parity/loss"] == pytest.approx(apart["validation/parity/loss"], rel=1e-5)


@pytest.mark.parametrize(
    "name", ["1/lora", "1/none", "1/early", "1/dora", "2/lora-2", "2/lora-3", "2/dora-3", "2/none-3"]
)
def test_what_is_frozen_is_the_base_bit_by_bit(runs: Callable[[str], Path], base_run: str, name: str) -> None:
    """In the checkpoint; a layer with adapters is merged there, so what carries one is compared before the merge."""
    base = weights(load_model(Path(base_run)).decoder)
    adapted = name.split("/")[1].split("-")[0] in ("lora", "dora", "early")
    tuned = weights(load_model(runs(name)).decoder)
    moved = {n for n, w in base.items() if not torch.equal(tuned[n], w)}
    early = {0, 1} if "early" in name else {0, 1, 2, 3}
    may_move = {n for n in base if adapted and "_proj." in n and int(n.split(".")[1]) in early} | {"norm.weight"}
    assert moved == may_move


@pytest.mark.parametrize("name", ["1/full", "2/full-3"])
def test_frozen_skip_routers_stay_under_full_tuning(runs: Callable[[str], Path], base_run: str, name: str) -> None:
    base, tuned = weights(load_model(Path(base_run)).decoder), weights(load_model(runs(name)).decoder)
    assert {n for n, w in base.items() if torch.equal(tuned[n], w)} == {n for n in base if ".router." in n}
    free = weights(load_model(runs("1/routers-tuned")).decoder)
    assert not any(torch.equal(free[n], w) for n, w in base.items() if ".router." in n)


@pytest.mark.parametrize("name", ["1/dropped", "2/dropped-3"])
def test_four_steps_are_two_and_two_more_bit_by_bit(
    runs: Callable[[str], Path], tuning: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """With dropout in the adapters: what died after step 2 goes on as if it had not."""
    straight, again = runs(name), tmp_path / "again"
    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    shutil.rmtree(again / "adapter")
    ranks = int(name[0])
    overrides = ONE_RANK["dropped"] if ranks == 1 else TWO_RANKS["dropped-3"]
    config = tmp_path / "tune.yaml"
    config.write_text(yaml.safe_dump(tuning))
    done = run(
        "tune.train", str(config), *overrides, f"train.run_dir={again}", "train.checkpoint.resume=required",
        "train.log.peak_tflops=null",  # measured then, between the restored generators and the first step
        processes=ranks,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "step-00000002 at step 2" in done.stdout
    one, other = figures_of(straight), figures_of(again)
    assert [one[step] for step in (3, 4)] == [other[step] for step in (3, 4)]
    decoder = load_model(again, merged=False).decoder
    assert not any(module.training for module in decoder.modules())  # dropout, too
    merged = run("tune.merge", str(again), str(tmp_path / "merged"))
    assert merged.returncode == 0, merged.stdout[-2000:]
    for file in ("adapter_model.safetensors", "ensemble.safetensors"):
        before, after = load_tensors(straight / "adapter" / file), load_tensors(again / "adapter" / file)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_two_ranks_at_stage_3_go_on_as_one_at_stage_1(
    runs: Callable[[str], Path], tuning: dict[str, Any], tmp_path: Path
) -> None:
    """Frozen weights, adapters, the ensemble's norms and router, and what the optimiser knows of them."""
    straight, again = runs("2/lora-3"), tmp_path / "again"
    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    shutil.rmtree(again / "adapter")
    config = tmp_path / "tune.yaml"
    config.write_text(yaml.safe_dump(tuning))
    overrides = [*METHODS["lora"], "deepspeed.zero_stage=1", f"train.run_dir={again}"]
    done = run("tune.train", str(config), *overrides, "train.checkpoint.resume=required")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ranks 2 there and 1 here, ZeRO stage 3 there and 1 here" in done.stdout
    assert losses(again) == pytest.approx(losses(straight), rel=2e-5)


CHANGES = {
    "ensemble.layers=3": "ensemble.layers 2 there, 3 here",
    "ensemble.temperature=2.0": "ensemble.temperature 1.0 there, 2.0 here",
    "ensemble=null": "ensemble.layers 2 there, None here",
    "adapter.rank=8": "adapter.rank 4 there, 8 here",
    "adapter.alpha=64": "adapter.alpha 16.0 there, 64.0 here",
    "adapter.kind=full": "adapter.kind lora there, full here",
    "base.routers=tuned": "base.routers frozen there, tuned here",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_another_method_is_refused(
    runs: Callable[[str], Path], change: str, tuning: dict[str, Any]
) -> None:
    config = copy.deepcopy(tuning)
    _apply_override(config, change)
    file = TuneFile.model_validate(config)
    resolved = resolve(file, load_base(file.base.path))
    checkpoint = runs("1/lora") / "checkpoints/step-00000002"
    written = {**conditions(resolved, ALONE), "zero_stage": 2, "data_fingerprint": "same"}
    with pytest.raises(ValueError, match="holds a different model") as told:
        _check_fit(written, peek(checkpoint / CONFIG), checkpoint, "same", resolved, ALONE)
    assert CHANGES[change] in str(told.value) and "resume with the blocks that the run was started with" in str(
        told.value
    )


def test_a_run_is_resumed_after_its_base_has_trained_on(
    runs: Callable[[str], Path], tuning: dict[str, Any], base_run: str, tmp_path: Path
) -> None:
    straight, again, base = runs("1/lora"), tmp_path / "again", tmp_path / "base"
    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    shutil.rmtree(again / "adapter")
    shutil.copytree(base_run, base)
    newer = shutil.copytree(base / "checkpoints/step-00000004", base / "checkpoints/step-00000005")
    facts = manifest.read(newer, ALONE) | {"step": 5}
    (newer / manifest.NAME).unlink()
    manifest.write(newer, {name: facts[name] for name in facts if name not in ("files", "format")})
    config = tmp_path / "tune.yaml"
    config.write_text(yaml.safe_dump(tuning | {"base": {"path": str(base)}}))
    done = run("tune.train", str(config), *ONE_RANK["lora"], f"train.run_dir={again}", "train.checkpoint.resume=auto")
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"stage-one checkpoint {base}/checkpoints/step-00000004, step 4" in done.stdout
    assert figures_of(again)[4]["train/loss"] == figures_of(straight)[4]["train/loss"]
    saved = yaml.safe_load((again / "config.yaml").read_text())
    assert saved["base"]["path"] == str(base / "checkpoints/step-00000004")


def test_another_base_is_noticed(runs: Callable[[str], Path], tuning: dict[str, Any]) -> None:
    saved = yaml.safe_load((runs("1/lora") / "config.yaml").read_text())
    assert len(saved["base"]["sha256"]) == 64
    config = copy.deepcopy(tuning)
    config["base"]["sha256"] = "0" * 64
    file = TuneFile.model_validate(config)
    with pytest.raises(ValueError, match="differs from the one that this config was resolved with"):
        resolve(file, load_base(file.base.path))


def test_an_evaluation_stands_in_its_steps_line(runs: Callable[[str], Path]) -> None:
    """So one that was cut short is not there at all, and a resume makes it again."""
    lines = [json.loads(text) for text in (runs("1/lora") / "metrics.jsonl").read_text().splitlines()]
    (of_step,) = [line for line in lines if line["step"] == 2]
    assert {"train/loss", "validation/parity/loss/ensemble", "validation/parity/loss"} <= of_step.keys()
