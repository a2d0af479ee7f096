"""The generated DeepSpeed JSON, key by key, and what ``deepspeed.extra`` may and may not do to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trainer.config import PretrainConfig
from trainer.deepspeed_config import deepspeed_config, owns_clipping

Configure = Callable[..., PretrainConfig]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_whole_json_of_every_stage(configure: Configure, stage: int, world_size: int) -> None:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 2:
        zero["reduce_scatter"] = False
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    made = deepspeed_config(configure(f"deepspeed.zero_stage={stage}", "train.clip_norm=0.7"), world_size)
    assert made == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4 // world_size,
        "gradient_clipping": 0.0 if stage == 0 else 0.7,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": None,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_sums_micro_batches_in_fp32_where_deepspeed_can(configure: Configure, stage: int) -> None:
    several = deepspeed_config(configure("train.precision=bf16", f"deepspeed.zero_stage={stage}"), 1)
    assert several["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert several["fp16"] == {"enabled": False}
    assert several["gradient_clipping"] == 1.0
    assert several.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage > 1 else None)
    assert "data_types" not in deepspeed_config(configure("train.micro_batch_samples=8"), 1)


def test_fp16_scales_its_loss_and_takes_means_before_sums(configure: Configure) -> None:
    made = deepspeed_config(configure("train.precision=fp16"), 1)
    assert made["zero_optimization"] == {"stage": 2}
    assert made["fp16"] == {"enabled": True, "initial_scale_power": 12} and made["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["deepspeed.offload=none"], set()),
        (["deepspeed.offload=optimizer"], {"offload_optimizer"}),
        (["deepspeed.zero_stage=3", "deepspeed.offload=optimizer"], {"offload_optimizer"}),
        (["deepspeed.zero_stage=3", "deepspeed.offload=all"], {"offload_optimizer", "offload_param"}),
    ],
)
def test_offload_says_what_moves(configure: Configure, overrides: list[str], expected: set[str]) -> None:
    zero = deepspeed_config(configure(*overrides), 1)["zero_optimization"]
    moved = {key for key in zero if key.startswith("offload")}
    assert moved == expected
    assert all(zero[key] == {"device": "cpu", "pin_memory": True} for key in moved)


@pytest.mark.parametrize("stage", [1, 3])
def test_muon_is_deepspeeds_own(configure: Configure, stage: int) -> None:
    muon = [
        "train.optimizer.kind=muon",
        "train.clip_norm=0",
        "train.optimizer.lr=0.01",
        f"deepspeed.zero_stage={stage}",
    ]
    made = deepspeed_config(configure(*muon, "train.optimizer.muon_momentum=0.9", "train.optimizer.eps=1e-7"), 1)
    assert made["optimizer"]["type"] == "Muon"
    params = made["optimizer"]["params"]
    assert (params["lr"], params["momentum"], params["eps"], params["torch_adam"]) == (0.01, 0.9, 1e-7, True)
    assert (params["betas"], params["weight_decay"]) == ([0.9, 0.95], 0.1)
    assert made["zero_optimization"].get("reduce_scatter") == (False if stage == 3 else None)
    assert made["gradient_clipping"] == 0.0


def test_other_optimisers_are_not_in_the_json(configure: Configure) -> None:
    assert "optimizer" not in deepspeed_config(configure(), 1)


def test_extra_is_merged_into_every_depth(configure: Configure) -> None:
    extra = (
        "{communication_data_type: fp32, zero_optimization: {overlap_comm: false, stage: 2}, gradient_clipping: 1.0}"
    )
    made = deepspeed_config(configure(f"deepspeed.extra={extra}"), 1)
    assert made["communication_data_type"] == "fp32"
    assert made["zero_optimization"] == {"stage": 2, "reduce_scatter": False, "overlap_comm": False}
    assert made["gradient_clipping"] == 1.0  # the same value is no contradiction


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("{gradient_clipping: 0.5}", r"deepspeed\.extra\.gradient_clipping \(0\.5\) contradicts .* \(1\.0\)"),
        ("{zero_optimization: {stage: 3}}", r"deepspeed\.extra\.zero_optimization\.stage \(3\) contradicts .* \(2\)"),
        ("{zero_optimization: 3}", r"deepspeed\.extra\.zero_optimization \(3\) contradicts"),
        ("{train_batch_size: 16}", r"deepspeed\.extra\.train_batch_size \(16\) contradicts .* \(8\)"),
        ("{bf16: {enabled: true}}", r"deepspeed\.extra\.bf16\.enabled \(True\) contradicts .* \(False\)"),
        ("{fp16: {enabled: true}}", r"deepspeed\.extra\.fp16\.enabled \(True\) contradicts .* \(False\)"),
        ("{gradient_cliping: 1.0}", r"extra\.gradient_cliping is not among .* \(communication_data_type, zero_"),
        (
            "{zero_optimization: {zero_quantized_weights: true}}",
            r"zero_quantized_weights is not .*allow_untested: true",
        ),
        ("{compile: {deepcompile: true}}", r"deepspeed\.extra\.compile is not among the settings known"),
        ("{bf16: {immediate_grad_update: true}}", r"extra\.bf16\.immediate_grad_update .*\(nothing in this block\)"),
    ],
)
def test_extra_must_not_contradict(configure: Configure, extra: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        deepspeed_config(configure(f"deepspeed.extra={extra}"), 1)


def test_zero_3_gathers_a_layer_ahead(configure: Configure) -> None:
    """Of a large model; DeepSpeed's default of 5e7 elements is enough for others, and a size that is given stays."""
    made = deepspeed_config(configure("deepspeed.zero_stage=3"), 1)["zero_optimization"]
    assert "stage3_prefetch_bucket_size" not in made
    large = [
        "deepspeed.zero_stage=3",
        "model.width=8192",
        "model.heads=64",
        "model.kv_heads=8",
        "model.ffn_width=28672",
    ]
    made = deepspeed_config(configure(*large), 1)["zero_optimization"]
    attention, ffn = 8192 * 8192 * 2 + 8192 * 1024 * 2, 3 * 8192 * 28672
    assert made["stage3_prefetch_bucket_size"] == attention + ffn
    given = "deepspeed.extra={zero_optimization: {stage3_prefetch_bucket_size: 1000}}"
    assert deepspeed_config(configure(*large, given), 1)["zero_optimization"]["stage3_prefetch_bucket_size"] == 1000


def test_what_is_not_known_can_be_forced(configure: Configure) -> None:
    extra = "{zero_optimization: {zero_quantized_weights: true}, compile: {deepcompile: true}}"
    made = deepspeed_config(configure(f"deepspeed.extra={extra}", "deepspeed.allow_untested=true"), 1)
    assert made["zero_optimization"]["zero_quantized_weights"] is True and made["compile"] == {"deepcompile": True}


def test_a_batch_that_does_not_divide_is_refused(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"2 x 3 = 6"):
        deepspeed_config(configure(), 3)


@pytest.mark.parametrize(
    ("stage", "precision", "own"),
    [(0, "fp32", True), (0, "bf16", False), (1, "fp16", False), (1, "fp32", False), (3, "fp32", False)],
)
def test_the_trainer_clips_only_where_deepspeed_would_not_tell_the_norm(
    configure: Configure, stage: int, precision: str, own: bool
) -> None:
    config = configure(f"deepspeed.zero_stage={stage}", f"train.precision={precision}")
    assert owns_clipping(config) is own
    assert deepspeed_config(config, 1)["gradient_clipping"] == (0.0 if own else 1.0)
