"""Suites: what is planned is equal in executed FLOPs, and what cannot be is reported in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.isoflop.suite import Suite, load_suite, mean_target, plan, planned_flops, step_tokens
from model.budget import Budget
from model.flops import Routed, executed_flops
from model.schedules import Progress
from tests.bench.isoflop.suites import DENSE, planned, write_suite
from tests.config_reads import blocks_of, unread
from tests.launching import ROOT

ROUTERS: dict[str, dict[str, Any]] = {
    "learned": {},
    "warmed up dense": {"budget": {"dense_until": 0.2, "reach_by": 0.5}},
    "of modules": {"granularity": "module"},
    "one budget": {"budget": {"kind": "global"}},
    "not in all layers": {"always_on_first": 1},
    "random": {"kind": "random"},
    "expert choice": {"kind": "expert_choice"},
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_density_is_chosen_whose_flops_are_the_references(
    tiny: dict[str, Any], tmp_path: Path, router: dict[str, Any]
) -> None:
    variants = {"dense": {"set": {**DENSE, "model.layers": 2}}}
    variants["skip"] = {"set": {"model.router": {"density": 0.9, **router}}, "equal_flops": "density"}
    _, (dense, skip) = planned(write_suite(tmp_path, tiny, variants=variants, tokens=25_600), tmp_path)
    assert skip.planned_flops == pytest.approx(dense.planned_flops, rel=1e-5)
    assert dense.config.train.steps == skip.config.train.steps == 100
    chosen = skip.config.model.router
    assert chosen is not None and 0 < chosen.density < 0.9
    for name, value in router.items():  # what a variant does not name stays the backbone's
        block, asked = (chosen.budget, value) if name == "budget" else (chosen, {name: value})
        assert {key: getattr(block, key) for key in asked} == asked
    if "budget" in router and "reach_by" in router["budget"]:
        assert mean_target(skip.config) == pytest.approx(
            0.2 + 0.3 * (1 + chosen.density) / 2 + 0.5 * chosen.density, abs=5e-3
        )
        assert mean_target(skip.config) > chosen.density + 0.1


def test_planned_flops_are_those_of_every_step_at_its_target(tiny: dict[str, Any], tmp_path: Path) -> None:
    budget = {"dense_until": 0.25, "reach_by": 0.75}
    variants = {"dense": {"set": DENSE}, "skip": {"set": {"model.router.budget": budget}}}
    _, (_, skip) = planned(write_suite(tmp_path, tiny, variants=variants), tmp_path)
    config, tokens, keys = skip.config, 256.0, 8 * (32 * 33 / 2)
    assert step_tokens(config) == tokens and config.train.steps == 4
    asked = Budget(config.model, 32)
    targets = [asked.target(Progress(step, 4)) for step in range(4)]
    assert targets == [1.0, 1.0, 0.75, 0.5]
    each = [executed_flops(config.model, Routed(tokens, keys, [t * tokens] * 3, [t * keys] * 3)) for t in targets]
    assert skip.planned_flops == planned_flops(config) == pytest.approx(3 * sum(each), rel=1e-12)


def test_tokens_are_chosen_to_the_nearest_step(tiny: dict[str, Any], tmp_path: Path) -> None:
    variants = {
        "dense": {"set": DENSE},
        "deep": {"set": {"model.router": None, "model.layers": 3}, "equal_flops": "tokens"},
    }
    _, (dense, deep) = planned(write_suite(tmp_path, tiny, variants=variants, tokens=25_700), tmp_path)
    assert dense.config.train.steps == 100 > deep.config.train.steps
    one_step = deep.planned_flops / deep.config.train.steps
    assert abs(deep.planned_flops - dense.planned_flops) <= one_step / 2


def test_runs_are_in_order_of_seeds_and_say_how_to_be_started(tiny: dict[str, Any], tmp_path: Path) -> None:
    variants = {"dense": {"set": DENSE}, "skip": {"set": {"train": {"optimizer.lr": 1e-5}}}, "more": {"seeds": [1, 5]}}
    path = write_suite(tmp_path, tiny, variants=variants, seeds=[0, 1], set={"train.clip_norm": 0.5})
    suite, runs = planned(path, tmp_path / "out")
    names = ["dense-seed0", "skip-seed0", "dense-seed1", "skip-seed1", "more-seed1", "more-seed5"]
    assert [run.name for run in runs] == names
    assert [suite.first_seed(name) for name in variants] == [0, 0, 1]
    for run in runs:
        train = run.config.train
        assert (train.run_dir, train.seed, train.clip_norm) == (str(tmp_path / "out/runs" / run.name), run.seed, 0.5)
        assert train.checkpoint.resume == "auto"
        assert train.optimizer.lr == (1e-5 if run.variant == "skip" else 0.003)
        assert not any('"steps"' in text for text in run.overrides)
    assert runs[0].config.data == runs[-1].config.data  # the same order of the same data


def test_a_key_of_the_command_line_wins_over_the_files(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = write_suite(tmp_path, tiny, set={"train.optimizer.lr": 0.1})
    suite = load_suite(path, ["set.train.optimizer.lr=0.2", "variants.skip.set.model.layers=4", "tokens=512"])
    dense, skip = plan(suite, tmp_path)
    assert dense.config.train.optimizer.lr == 0.2 and dense.config.train.steps == 2
    assert (dense.config.model.layers, skip.config.model.layers) == (1, 4)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "reference": ({"reference": "dnse"}, "reference 'dnse' is not a variant; it must be one of dense, skip"),
    "matched reference": ({"reference": "skip"}, "variant skip is the reference, .* leave out its equal_flops"),
    "no variants": ({"variants": {}}, "variants: dictionary should have at least 1 item"),
    "name": ({"variants": {"dense": {}, "a/b": {}}}, "variant 'a/b': a name is part of a folder name"),
    "unknown key": ({"variants": {"dense": {"sett": {}}}}, "unknown key 'variants.dense.sett'; did you mean 'vari"),
    "unknown key of a run": (
        {"variants": {"dense": {"set": {"model.layer": 2}}}},
        "variant dense: .*did you mean 'model.l",
    ),
    "seeds": ({"seeds": [3, 3]}, "seed 3 is listed twice, but two runs cannot share a folder"),
    "own seeds": ({"variants": {"dense": {"seeds": [1, 1]}}}, "variant dense: seed 1 is listed twice"),
    "steps": (
        {"set": {"train": {"steps": 5}}},
        "set must not have train.steps, because it follows from the suite's tok",
    ),
    "seed": ({"variants": {"dense": {"set": {"train.seed": 5}}}}, "variant dense: set must not have train.seed"),
    "data": (
        {"variants": {"dense": {"set": {"data.seed": 5}}}},
        "must not have data.seed, because every run sees the same",
    ),
    "windows": ({"variants": {"dense": {"set": {"train.evaluation.samples": 5}}}}, "the same windows"),
    "no router": (
        {"variants": {"dense": {"set": DENSE}, "d2": {"set": DENSE, "equal_flops": "density"}}},
        "variant d2: equal_flops density chooses the density of a router, but this model is dense",
    ),
    "too deep": (
        {"variants": {"dense": {"set": DENSE}, "skip": {"set": {"model.layers": 90}, "equal_flops": "density"}}},
        r"variant skip: no router.density in \(0, 1\] makes its executed FLOPs those of dense; it plans \d+\.\d\d of",
    ),
    "too shallow": (
        {"variants": {"dense": {"set": {**DENSE, "model.layers": 9}}, "skip": {"equal_flops": "density"}}},
        "no router.density .* at 1; give it other layers, or equal_flops: tokens",
    ),
    "warm-up": (
        {"set": {"train.schedule.warmup_steps": 9}},
        r"must not exceed .* \(train.steps follows from the suite's to",
    ),
    "task": (
        {"downstream": {"tasks": ["squad"], "data": "x"}},
        "a task must be blimp, blimp_NAME, classify_NAME or perplexity, got 'squ",
    ),
    "tokens": ({"tokens": 0}, "tokens: input should be greater than 0"),
    "mirror": ({"set": {"train.checkpoint.mirror": "s3://b/run"}}, "mirror s3://b/run belongs to one run, but a suite"),
    "validation": ({"set": {"data.validation": []}}, "has no data.validation, but a suite compares validation losses"),
    "backbone": ({"backbone": "configs/dem.yaml"}, "variant dense: config file configs/dem.yaml does not exist"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(tiny: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        planned(write_suite(tmp_path, tiny, **changes), tmp_path)


def test_a_variant_may_confine_attention_but_not_change_the_data(tiny: dict[str, Any], tmp_path: Path) -> None:
    variants = {"dense": {"set": {**DENSE, "data.confine_attention": True, "data": {"restart_positions": True}}}}
    _, (dense,) = planned(write_suite(tmp_path, tiny, variants=variants), tmp_path)
    assert dense.config.data.confine_attention and dense.config.data.restart_positions


@pytest.mark.parametrize("path", sorted((ROOT / "bench/suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites_load_and_their_flops_are_equal(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    suite, runs = planned(path, tmp_path)
    reference = next(run.planned_flops for run in runs if run.variant == suite.reference)
    for run in runs:
        assert abs(run.planned_flops / reference - 1) < 1e-3, run.name
        assert run.config.accumulation(1) >= 1
    assert (
        len({run.folder for run in runs}) == len(runs) == sum(len(suite.seeds_of(v)) for v in suite.variants.values())
    )
    assert path.read_text().startswith("# ")


def test_the_large_suite_has_the_small_ones_variants() -> None:
    small, variants, large = (load_suite(ROOT / f"bench/suites/{name}.yaml") for name in ("small", "variants", "large"))

    def kinds(suite: Suite) -> set[tuple[str, str]]:
        """Names without their numbers of layers."""
        named = {(re.sub(r"-\d+", "", name), v.equal_flops) for name, v in suite.variants.items()}
        return {(name, how) for name, how in named if name != "skip-plain"}

    assert kinds(small) < kinds(variants) == kinds(large)
    assert [len(suite.seeds_of(suite.variants[suite.reference])) for suite in (small, large)] == [2, 3]


@pytest.mark.parametrize(("name", "block"), blocks_of(Suite).items())
def test_every_field_says_what_it_is(name: str, block: Any) -> None:
    for field, info in block.model_fields.items():
        assert info.description and info.description.rstrip().endswith("."), f"{name}.{field}"


def test_every_field_is_read() -> None:
    assert unread(Suite, sorted((ROOT / "bench").rglob("*.py"))) == []


def test_values_survive_the_way_to_the_command_line(tiny: dict[str, Any], tmp_path: Path) -> None:
    odd = {"train.optimizer.betas": [0.8, 0.9], "train.optimizer.eps": 1e-12, "deepspeed.extra": {"a": {"b": True}}}
    _, runs = planned(write_suite(tmp_path, tiny, set=odd), tmp_path)
    for run in runs:
        assert run.config.train.optimizer.betas == (0.8, 0.9) and run.config.train.optimizer.eps == 1e-12
        assert run.config.deepspeed.extra == {"a": {"b": True}}
        for text in run.overrides:
            json.loads(text.partition("=")[2])
