"""The plan's memory against bytes that a real engine holds, and against the ZeRO paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from launch.plan.communication import sequence_volume, volume
from launch.plan.memory_model import ZERO_DEFAULTS, Memory, checkpoint_bytes, memory
from launch.plan.workload import (
    STAGES,
    Weights,
    Workload,
    ZeroStage,
    computed_share,
    count_weights,
    read_workload,
)
from model.decoder import Decoder
from model.flops import parameter_counts
from tests.launching import run
from trainer.config import WEIGHT_BYTES, PretrainConfig

CLOSE = 0.15
"""What the plan may be off by."""
BUCKET = 1_000_000


@pytest.fixture
def config(tiny: dict[str, Any]) -> dict[str, Any]:
    """A run whose weights, logits and activations all take some megabytes."""
    tiny["model"] |= {"vocab_size": 1000, "layers": 4, "width": 192, "heads": 4, "kv_heads": 2, "ffn_width": 512}
    tiny["data"] |= {"sequence_tokens": 128, "tokenizer": {"vocab_size": 1000}}
    tiny["train"] |= {"micro_batch_samples": 2}
    tiny["deepspeed"]["extra"] = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    return tiny


Measured = list[tuple[str, Workload, Memory, dict[str, float]]]


@pytest.fixture
def measure(config: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> Callable[..., Measured]:
    """Build the engine at every stage on real ranks; what was planned and what was found."""

    def measured(ranks: int, precision: str, *overrides: str, stages: Sequence[ZeroStage] = STAGES) -> Measured:
        path, cases, out = write_config(config), tmp_path / "cases.json", tmp_path / "out.json"
        batch = f"train.global_batch_samples={2 * 2 * ranks}"
        every = [
            [f"deepspeed.zero_stage={stage}", f"train.precision={precision}", batch, *overrides] for stage in stages
        ]
        cases.write_text(json.dumps(every))
        done = run("tests.launch.plan.memory_worker", path, str(cases), str(out), processes=ranks)
        assert done.returncode == 0, done.stdout
        found = []
        for stage, case, result in zip(stages, every, json.loads(out.read_text()), strict=True):
            workload = read_workload(path, case)
            density = result["density"] if workload.model.sites else None
            found.append((f"stage {stage}", workload, memory(workload, stage, ranks, density=density), result))
        return found

    return measured


def test_bytes_in_bf16_on_two_ranks_are_as_planned(measure: Callable[..., Measured]) -> None:
    measured = measure(2, "bf16", stages=(2, 3))
    _agree(measured, 2)
    _moves_what_is_planned(measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "precision", "overrides"),
    [
        (1, "fp32", ()),
        (1, "bf16", ()),
        (2, "bf16", ()),
        (2, "fp32", ()),
        (2, "fp32", ("model.router.granularity=module",)),
        (2, "bf16", ("model.router=null", "train.activation_checkpointing=true")),
        (1, "fp32", ("train.activation_checkpointing=true",)),
        (2, "bf16", ("train.activation_checkpointing=true", "model.router.granularity=module")),
        (1, "bf16", ("model.router.execution=reference", "model.tied_head=true")),
        (2, "bf16", ("deepspeed.sequence_parallel=2", "model.router.explore=0.1")),
        (2, "fp32", ("deepspeed.sequence_parallel=2", "train.activation_checkpointing=true")),
    ],
)
def test_bytes_are_as_planned(
    measure: Callable[..., Measured], ranks: int, precision: str, overrides: tuple[str, ...]
) -> None:
    measured = measure(ranks, precision, *overrides)
    _agree(measured, ranks)
    if ranks > 1:
        _moves_what_is_planned(measured)


def _agree(measured: Measured, ranks: int) -> None:
    for name, workload, plan, found in measured:
        width = WEIGHT_BYTES[workload.config.train.precision]
        # Between micro-batches stages 1 and 3 still hold their bucket.
        bucket = width * BUCKET if name in ("stage 1", "stage 3") else 0
        planned = {
            "weights": plan.weights,
            "optimizer": plan.optimizer,
            "others": plan.gradients + bucket,
            "activations": plan.activations,
            "peak": plan.peak - plan.context,
            "checkpoint": checkpoint_bytes(workload, workload.config.deepspeed.zero_stage),
        }
        print(name, {part: round(found[part] / bytes_planned, 3) for part, bytes_planned in planned.items()})
        for part, bytes_planned in planned.items():
            assert found[part] == pytest.approx(bytes_planned, rel=CLOSE), f"{name}, {ranks} ranks: {part}"


def _moves_what_is_planned(measured: Measured) -> None:
    for name, workload, _, found in measured:
        stage, width = workload.config.deepspeed.zero_stage, WEIGHT_BYTES[workload.config.train.precision]
        micro_batches = 2 * workload.shared
        moved, shared = volume(workload, stage, micro_batches), sequence_volume(workload, micro_batches)
        if stage == 3:
            found = {**found, "all_reduce": 0.0}  # gloo's reduce-scatter is an all-reduce inside
        planned = {
            "all_reduce": moved.all_reduce,
            "all_gather": moved.all_gather + shared.all_gather,
            "reduce_scatter": moved.reduce_scatter,
            "exchange": shared.reduce_scatter,
        }
        for kind, bytes_planned in planned.items():
            assert found[kind] * width == pytest.approx(bytes_planned, rel=0.02), f"{name}: {kind}"


# Rajbhandari et al. 2020 (arXiv:1910.02054), table 1: GB a GPU of a 7.5 B model at 1, 4, 16, 64, 256 and 1,024 GPUs.
PAPER = {
    1: [120, 52.5, 35.6, 31.4, 30.4, 30.1],
    2: [120, 41.3, 21.6, 16.6, 15.4, 15.1],
    3: [120, 30, 7.5, 1.88, 0.47, 0.12],
}


@pytest.mark.parametrize(("stage", "gigabytes"), PAPER.items())
def test_state_is_the_zero_papers(stage: ZeroStage, gigabytes: list[float], config: dict[str, Any]) -> None:
    for ranks, expected in zip([1, 4, 16, 64, 256, 1024], gigabytes, strict=True):
        config["train"] |= {"precision": "bf16", "global_batch_samples": 2 * ranks}
        run_config = PretrainConfig.model_validate(config)
        weights = Weights(7_500_000_000, 7_500_000_000, small=0, moment_bytes=8 * 7.5e9)
        plan = memory(Workload(run_config, weights), stage, ranks)
        assert (plan.weights + plan.gradients + plan.optimizer) / 1e9 == pytest.approx(expected, abs=0.05)


def test_buckets_are_of_deepspeeds_own_size() -> None:
    defaults = DeepSpeedZeroConfig()
    assert {
        "reduce_bucket_size": defaults.reduce_bucket_size,
        "stage3_max_live_parameters": defaults.max_live_parameters,
        "stage3_prefetch_bucket_size": defaults.prefetch_bucket_size,
    } == ZERO_DEFAULTS
    assert DeepSpeedZeroConfig(stage=3).overlap_comm and not DeepSpeedZeroConfig(stage=2).overlap_comm


def test_the_config_moves_memory_the_right_way(config: dict[str, Any], write_config: Callable[..., str]) -> None:
    def plan(stage: ZeroStage, ranks: int, *overrides: str) -> Memory:
        return memory(read_workload(write_config(config), ["train.precision=bf16", *overrides]), stage, ranks)

    base = plan(3, 2)
    assert plan(3, 4).peak < base.peak
    shared = [plan(3, 4, f"deepspeed.sequence_parallel={ranks}").activations for ranks in (1, 2, 4)]
    assert 0.9 * shared[0] > shared[1] > shared[2] > shared[0] / 4
    assert plan(3, 2, "train.activation_checkpointing=true").activations < base.activations
    assert plan(3, 2, "model.router.density=0.25").activations < base.activations
    assert plan(3, 2, "model.router.execution=reference").activations > 1.4 * base.activations
    assert plan(3, 2, "deepspeed.persistence_threshold=1000").weights > base.weights
    muon = plan(2, 2, "train.optimizer.kind=muon", "train.clip_norm=0")
    assert plan(0, 2).optimizer / 2 > plan(2, 2).optimizer * 0.99 > muon.optimizer
    small = plan(0, 2, "train.optimizer.kind=adafactor", "deepspeed.zero_stage=0")
    assert small.optimizer < 1.05 * 4 * plan(0, 2).weights / 2  # the masters and little else
    moved = plan(3, 2, "deepspeed.offload=all", "deepspeed.zero_stage=3")
    assert moved.host > moved.weights and moved.optimizer == 0 and moved.peak < base.peak
    offloaded = plan(2, 2, "deepspeed.offload=optimizer")
    assert offloaded.host >= plan(2, 2).optimizer and offloaded.gradients == 0


def test_a_device_must_hold_the_peak_and_leave_room() -> None:
    plan = Memory(10 * 2**30, 0, 0, 0, 0, 0, update=9 * 2**30, context=0, host=0)
    assert plan.peak == 19 * 2**30
    assert plan.fits(20.0) and not plan.fits(19.5)


def test_parameters_are_counted_as_flops_counts_them(config: dict[str, Any]) -> None:
    for changes in ({}, {"tied_head": True}, {"qk_norm": True}, {"router": None}):
        run_config = PretrainConfig.model_validate({**config, "model": {**config["model"], **changes}})
        with torch.device("meta"):
            weights = count_weights(Decoder(run_config.model), run_config)
        assert weights.total == weights.trained == parameter_counts(run_config.model)["total"]


def test_a_capacity_is_computed_whatever_the_router_picks(config: dict[str, Any]) -> None:
    config["model"]["router"] |= {"execution": "capacity", "capacity_factor": 1.25}
    model = PretrainConfig.model_validate(config).model
    assert computed_share(model, 1024, 0.3) == 640 / 1024
