"""Rules between fields: each mistake is one sentence with the fields, the values and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from settings import to_yaml
from trainer.config import PretrainConfig, load_run

Configure = Callable[..., PretrainConfig]

REFUSED = [
    (["model.vocab_size=401"], "model.vocab_size (401) must equal data.tokenizer.vocab_size (400)"),
    (["model.max_positions=31"], "data.sequence_tokens (32) must not exceed model.max_positions (31)"),
    (
        ["train.optimizer.kind=adafactor", "deepspeed.zero_stage=1"],
        "train.optimizer.kind adafactor needs deepspeed.zero_stage 0, because ZeRO flattens the matrices",
    ),
    (["train.precision=fp16", "deepspeed.zero_stage=0"], "train.precision fp16 needs deepspeed.zero_stage 1, 2 or 3"),
    (["train.optimizer.betas=[0.9,1.0]"], "train.optimizer.betas[1]: input should be less than 1, got 1.0"),
    (["train.optimizer.betas=[-0.1,0.9]"], "train.optimizer.betas[0]: input should be greater than or equal to 0"),
    (["train.optimizer.kind=muon"], "train.clip_norm (1.0) must be 0 with train.optimizer.kind muon"),
    (
        ["train.optimizer.kind=muon", "train.clip_norm=0", "deepspeed.offload=optimizer"],
        "train.optimizer.kind muon needs deepspeed.offload none",
    ),
    (
        ["deepspeed.zero_stage=0", "deepspeed.offload=optimizer"],
        "deepspeed.offload optimizer needs deepspeed.zero_stage 1, 2 or 3, got 0",
    ),
    (["deepspeed.offload=all"], "deepspeed.offload all moves parameters, which needs deepspeed.zero_stage 3, got 2"),
    (["train.compile=true", "deepspeed.zero_stage=3"], "train.compile needs deepspeed.zero_stage 0, 1 or 2, because"),
    (
        ["train.checkpoint.mirror=s3://bucket/run", "train.checkpoint.mirror_wait_s=1800"],
        "train.checkpoint.mirror_wait_s (1800) must be below train.timeout_s (1800), because the other ranks wait",
    ),
    (
        ["train.stall_timeout_s=600", "train.timeout_s=600"],
        "train.stall_timeout_s (600) must be below train.timeout_s (600), because a collective that times out",
    ),
    (
        ["deepspeed.sequence_parallel=3"],
        "data.sequence_tokens (32) must be divisible by 2 x deepspeed.sequence_parallel (6), because a window is cut "
        "into two stretches for each of the ranks that share it; take 30 or 36",
    ),
    (["deepspeed.sequence_parallel=32"], "take 64"),
    (
        ["deepspeed.sequence_parallel=2", "model.router.kind=expert_choice"],
        "deepspeed.sequence_parallel (2) must be 1 with model.router.kind expert_choice",
    ),
    (["deepspeed.sequence_parallel=2", "train.compile=true"], "train.compile needs deepspeed.sequence_parallel 1"),
    (["train.checkpoint.resume=runs/my/checkpoints/step-00000012"], "to go back to an earlier one: python -m launch"),
    (["train.checkpoint.resume=step-00000012"], "train.checkpoint.resume: it takes never, auto or required, which go"),
    (["train.schedule.warmup_steps=5"], "train.schedule.warmup_steps (5) must not exceed train.steps (4)"),
    (
        ["train.micro_batch_samples=3"],
        "train.global_batch_samples (8) must be divisible by train.micro_batch_samples (3)",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED)
def test_what_does_not_fit_together_is_refused(write_config, tiny, overrides, sentence):
    with pytest.raises(ValueError) as error:
        load_run(write_config(tiny), overrides)
    assert sentence in str(error.value)
    assert str(error.value).count("; ") <= 2 and "\n" not in str(error.value)


NOT_TO_START = [
    (
        ["train.schedule.warmup_steps=3", "train.schedule.end_step=2"],
        "train.schedule.warmup_steps (3) must not exceed train.schedule.end_step (2); set both",
    ),
    (
        ["train.schedule.kind=warmup_stable_decay", "train.schedule.decay_steps=5"],
        "train.schedule.decay_steps (5) must not exceed train.steps (4)",
    ),
    (
        ["train.spike={action: stop, window_steps: 5}"],
        "train.max_bad_steps (5) must be below train.spike.window_steps (5), after which a spike counts as normal",
    ),
    (
        ["train.profile.steps=[5,6]"],
        "train.profile.steps [5, 6] must not begin after the run's last step (4); give earlier",
    ),
    (
        ["train.stall_timeout_s=1e10", "train.timeout_s=1e11"],
        "train.timeout_s (1e+11) and train.stall_timeout_s (1e+10) must not exceed 1e+09 seconds",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), NOT_TO_START)
def test_what_no_run_should_start_with_is_refused_then_and_can_be_read(
    configure: Configure, overrides: list[str], sentence: str
) -> None:
    """A checkpoint of before these rules holds such a config, and must stay readable."""
    config = configure(*overrides)
    with pytest.raises(ValueError) as error:
        config.train.refuse_to_start()
    assert sentence in str(error.value)


ALLOWED = [
    ["data.sequence_tokens=32", "model.max_positions=32"],
    ["train.optimizer.kind=adafactor", "deepspeed.zero_stage=0"],
    ["train.optimizer.kind=adafactor", "deepspeed.zero_stage=0", "train.precision=bf16"],
    ["train.precision=fp16", "deepspeed.zero_stage=1"],
    ["train.optimizer.kind=muon", "train.clip_norm=0"],
    ["deepspeed.zero_stage=1", "deepspeed.offload=optimizer"],
    ["deepspeed.zero_stage=3", "deepspeed.offload=all"],
    ["train.schedule.warmup_steps=4"],
    ["train.micro_batch_samples=8"],
    ["deepspeed.sequence_parallel=16", "data.sequence_tokens=32"],
    ["train.compile=true", "deepspeed.sequence_parallel=1"],
]


@pytest.mark.parametrize("overrides", ALLOWED)
def test_the_borders_of_those_rules_are_allowed(configure: Configure, overrides: list[str]) -> None:
    configure(*overrides)


def test_all_problems_are_told_at_once(write_config: Callable[..., str], tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"vocab_size.*max_positions.*offload.*warmup_steps"):
        load_run(
            write_config(tiny),
            [
                "model.vocab_size=401",
                "model.max_positions=31",
                "deepspeed.offload=all",
                "train.schedule.warmup_steps=5",
            ],
        )


def test_accumulation_is_what_is_left_of_the_global_batch(configure: Configure) -> None:
    config = configure()
    assert [config.accumulation(ranks) for ranks in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(
        ValueError, match=r"must be divisible by .* ranks \(2 x 3 = 6\); set train.global_batch_samples=12$"
    ):
        config.accumulation(3)
    with pytest.raises(ValueError, match=r"\(2 x 8 = 16\); .*=16, or train.micro_batch_samples=1$"):
        config.accumulation(8)
    shared = configure("deepspeed.sequence_parallel=2")
    assert [shared.accumulation(ranks) for ranks in (2, 4, 8)] == [4, 2, 1]
    with pytest.raises(ValueError, match=r"sequence_parallel \(2\) must divide the number of ranks \(3\), because"):
        shared.accumulation(3)
    with pytest.raises(ValueError, match=r"micro_batch_samples x groups that share windows \(2 x 3 = 6\)"):
        shared.accumulation(6)


def test_run_dir_is_the_config_files_name_unless_given(write_config: Callable[..., str], tiny: dict[str, Any]) -> None:
    given = tiny["train"]["run_dir"]
    assert load_run(write_config(tiny)).train.run_dir == given
    del tiny["train"]["run_dir"]
    path = write_config(tiny, "my-run.yaml")
    assert load_run(path).train.run_dir == "runs/my-run"
    assert load_run(path, ["train.run_dir=elsewhere"]).train.run_dir == "elsewhere"
    assert not Path("runs/my-run").exists()  # loading makes nothing


def test_shares_of_the_run_are_tokens_in_the_run_folder(tiny: dict[str, Any], write_config: Callable[..., str]) -> None:
    """So a run that goes on for longer, from the config that it saved, keeps its borders."""
    path = write_config(tiny)
    stages = "[{name: main, from_share: 0, weights: {code: 1}}, {name: end, from_share: 0.75, weights: {code: 2}}]"
    config = load_run(path, [f"data.stages={stages}"])
    assert [(stage.from_tokens, stage.from_share) for stage in config.data.stages] == [(0, None), (24 * 32, None)]
    saved = Path(path).with_name("saved.yaml")
    saved.write_text(to_yaml(config))
    assert load_run(saved) == config
    assert load_run(saved, ["train.steps=400"]).data == config.data
    with pytest.raises(
        ValueError, match=r"'main' begins at token 0 and 'end', the next one, at token 0, so they overl"
    ):
        load_run(path, [f"data.stages={stages.replace('0.75', '0.01')}"])
