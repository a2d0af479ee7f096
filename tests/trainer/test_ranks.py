"""Same losses, same weights, no hang and no harm, at 1 and 2 ranks, ZeRO 0 to 3, and however the batch is split."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.launching import run

STAGES = (0, 1, 2, 3)


def _cases() -> list[dict[str, Any]]:
    cases = []
    for stage in STAGES:
        zero = f"deepspeed.zero_stage={stage}"
        whole, split = "train.micro_batch_samples=4", "train.micro_batch_samples=2"
        cases += [
            {"name": f"plain-{stage}", "rule": "plain", "overrides": [zero, whole]},
            {"name": f"split-{stage}", "rule": "plain", "overrides": [zero, split]},
            {"name": f"starved-{stage}", "rule": "starved", "overrides": [zero, whole]},
            {"name": f"shared-{stage}", "rule": "plain", "overrides": [zero, whole, "deepspeed.sequence_parallel=2"]},
            {"name": f"bf16-{stage}", "rule": "plain", "overrides": [zero, whole, "train.precision=bf16"]},
            {"name": f"bad_loss-{stage}", "rule": "bad_loss", "overrides": [zero, whole]},
            {"name": f"bad_loss-bf16-{stage}", "rule": "bad_loss", "overrides": [zero, whole, "train.precision=bf16"]},
            {"name": f"bad_gradient-{stage}", "rule": "bad_gradient", "overrides": [zero, whole]},
        ]
    modules = [
        "model.router.granularity=module",
        "model.router.budget.kind=global",
        "train.activation_checkpointing=true",
    ]
    uneven = ["deepspeed.zero_stage=2", "model.router.explore=0", "train.log.every_steps=2"]
    bf16 = ["deepspeed.zero_stage=1", "train.micro_batch_samples=4", "train.precision=bf16"]
    cases.append({"name": "shared-bf16", "rule": "plain", "overrides": [*bf16, "deepspeed.sequence_parallel=2"]})
    cases.append({"name": "uneven", "rule": "uneven", "overrides": [*uneven, "train.micro_batch_samples=2"]})
    modules.append("deepspeed.zero_stage=3")
    cases.append({"name": "modules-3", "rule": "starved", "overrides": modules})
    cases.append(
        {"name": "shared-starved", "rule": "starved", "overrides": [*modules, "deepspeed.sequence_parallel=2"]}
    )
    return cases


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Results of all cases by number of ranks; those of bf16 and of shared windows on two alone."""
    import yaml

    folder = tmp_path_factory.mktemp("ranks")
    config = {
        "model": {
            "vocab_size": 400, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn_width": 48,
            "router": {"density": 0.5, "explore": 0.2},
        },
        "data": corpus,
        "train": {
            "run_dir": str(folder / "run"), "steps": 10, "global_batch_samples": 8, "micro_batch_samples": 4,
            "precision": "fp32", "optimizer": {"lr": 0.003}, "clip_norm": 0.5, "z_loss": 1e-4,
        },
        "deepspeed": {"persistence_threshold": 0},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    results = {}
    for ranks in (1, 2):
        cases, out = folder / f"cases-{ranks}.json", folder / f"{ranks}.json"
        two = ("bf16", "shared")
        cases.write_text(json.dumps([c for c in _cases() if ranks == 2 or not c["name"].startswith(two)]))
        done = run(
            "tests.trainer.ranks_worker", str(folder / "run.yaml"), str(cases), str(out),
            processes=ranks, timeout_s=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        results[ranks] = json.loads(out.read_text())
    return results


@pytest.fixture
def reference(outcomes: dict[int, dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """One rank, stage 0: what plain PyTorch would do."""
    return lambda name: outcomes[1][name]


def _agree(one: dict[str, Any], other: dict[str, Any], relative: float) -> None:
    assert other["losses"] == pytest.approx(one["losses"], rel=relative)
    assert other["norms"] == pytest.approx(one["norms"], rel=max(relative * 20, 1e-4))
    assert other["densities"] == [pytest.approx(d, abs=1e-9) for d in one["densities"]]
    assert list(other["end"]) == list(one["end"])
    for name, sums in one["end"].items():
        assert other["end"][name] == pytest.approx(sums, rel=relative * 10, abs=1e-5), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_do_not_depend_on_ranks_stage_or_split(outcomes, reference, ranks, stage):
    """Invariant 5: eight windows a step, as 4 + 4 or by twos; the loss falls, so there is something to agree."""
    one = reference("plain-0")
    assert one["losses"][-1] < one["losses"][0] - 0.05
    _agree(one, outcomes[ranks][f"plain-{stage}"], 2e-5)
    _agree(one, outcomes[ranks][f"split-{stage}"], 2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_that_share_their_windows_train_as_one(outcomes, reference, stage):
    """Micro-batches of four windows, half of each on either rank."""
    _agree(reference("plain-0"), outcomes[2][f"shared-{stage}"], 2e-5)
    low = [outcomes[2][name]["losses"] for name in ("bf16-1", "shared-bf16")]
    assert low[1] == pytest.approx(low[0], rel=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_keeps_no_token_neither_hangs_nor_diverges(outcomes, reference, stage):
    """Invariant 4, and DeepSpeed's stale gradient: in one step no rank executes the site at all."""
    one = reference("starved-0")
    assert one["densities"][0][1] < 0.3 and one["densities"][1][1] == 0.0
    assert one["losses"] != reference("plain-0")["losses"]
    _agree(one, outcomes[1][f"starved-{stage}"], 2e-5)
    _agree(one, outcomes[2][f"starved-{stage}"], 2e-5)


def test_the_busiest_rank_of_a_logged_step_is_known_exactly(outcomes):
    """Rank 0 executes all of its 4 windows of 32 tokens at each of 2 sites, rank 1 a quarter; and alone, all in one."""
    for ranks, executed in ((2, [[128] * 2, [32] * 2]), (1, [[160] * 2])):
        got = outcomes[ranks]["uneven"]
        assert [most is None for most in got["largest"]] == [True, False, True, False]
        for most, each in zip(got["largest"][1::2], got["ranks"][1::2], strict=True):
            parts = [list(zip(*micro_batches, strict=True)) for micro_batches in each]
            own = [[[sum(site) for site in zip(*counts, strict=True)] for counts in part] for part in parts]
            assert [tokens for tokens, _ in own] == executed
            flops = [_flops(256 // ranks, tokens, keys) for tokens, keys in own]
            assert most == [max(flops), executed[0], [max(site) for site in zip(*(k for _, k in own), strict=True)]]
            assert max(flops) == flops[0] and (flops[0] > 1.2 * sum(flops) / ranks) == (ranks == 2)


def _flops(tokens: int, executed: list[float], keys: list[float]) -> float:
    """Of this model's training: head 32 x 400, keys and values 32 x 32, router 32 x 2, attention 2 x 32 x 32, ..."""
    always = 32 * 400 + 2 * (32 * 32 + 32 * 2)
    routed = sum(t * (2 * 32 * 32 + 3 * 32 * 48) + k * 2 * 32 for t, k in zip(executed, keys, strict=True))
    return 3 * 2 * (tokens * always + routed)


def test_module_routers_with_a_global_budget_and_checkpointing_agree_too(outcomes):
    _agree(outcomes[1]["modules-3"], outcomes[2]["modules-3"], 2e-5)
    _agree(outcomes[1]["modules-3"], outcomes[2]["shared-starved"], 2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_starts_from_the_same_weights_and_learns_the_same(outcomes, reference, stage):
    """Also that stage 0 keeps nothing of the step it takes at construction: it shrinks weights by lr x decay = 3e-4."""
    one, other = reference("plain-0"), outcomes[2][f"bf16-{stage}"]
    norm = {name: sums[0] for name, sums in one["start"].items()}
    assert other["start"]["embed_tokens.weight"][0] == pytest.approx(norm["embed_tokens.weight"], rel=5e-5)
    assert other["losses"] == pytest.approx(one["losses"], rel=5e-3)
    assert other["losses"] == pytest.approx(outcomes[2]["bf16-1"]["losses"], rel=2e-3)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["bad_loss", "bad_loss-bf16", "bad_gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_finite_never_reaches_the_weights(outcomes, ranks, name, stage):
    got = outcomes[ranks][f"{name}-{stage}"]
    assert got["applied"] == [True, False, True, True]
    assert got["unchanged"] and got["moved_after"] and got["finite"]
    if name == "bad_gradient":
        assert got["bad_ranks"] == []
    else:
        samples = {1: list(range(8, 16)), 2: list(range(12, 16))}[ranks]
        assert got["bad_ranks"] == [[ranks - 1, samples]]
