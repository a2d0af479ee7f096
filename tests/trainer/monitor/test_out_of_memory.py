"""An out-of-memory error is a sentence with the largest part and the fields that make it smaller."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.block import FeedForward
from tests.trainer.one_rank import engine_for, take_steps
from trainer import trainer as module
from trainer.config import PretrainConfig, StageConfig, load_run
from trainer.distributed import World
from trainer.exit_status import EXIT_MISTAKE
from trainer.monitor.out_of_memory import Parts, measured, out_of_memory
from tune.config import TuneConfig

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free."
ADAFACTOR = ["train.optimizer.kind=adafactor"]
MUON = ["train.optimizer.kind=muon", "train.clip_norm=0"]
LEAST = ["train.micro_batch_samples=1", "train.activation_checkpointing=true"]


def _run_out(*_: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError(CUDA)


def test_a_step_that_runs_out_is_one_sentence_and_status_78(
    tiny: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train_here(tiny, "train.stop_at_step=2") == 0
    monkeypatch.setattr(FeedForward, "forward", _run_out)
    assert train_here(tiny, "train.checkpoint.resume=required") == EXIT_MISTAKE
    told = capsys.readouterr().err
    run = Path(tiny["train"]["run_dir"])
    assert told.startswith("error: rank 0 ran out of memory in step 3 (training), asking for 2.50 GiB: of ")
    assert "the largest part is activations and what a step works with (" in told and told.count("\n") == 1
    assert "take train.micro_batch_samples=1, which accumulates more or train.activation_checkpointing=true or " in told
    assert f"what fits: python -m launch.plan {run / 'config.yaml'} --gpus 1 --gpu KIND" in told
    monkeypatch.undo()
    assert train_here(tiny, "train.checkpoint.resume=required") == 0  # nothing is lost


def test_an_engine_that_does_not_fit_is_told_so(
    tiny: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "build_engine", _run_out)
    assert train_here(tiny) == EXIT_MISTAKE
    told = capsys.readouterr().err
    assert "ran out of memory while the engine was built, asking for 2.50 GiB: parameters and optimiser states" in told
    assert "take more GPUs, over which ZeRO divides it or deepspeed.offload=optimizer" in told


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_rank_holds_is_counted_at_every_stage(
    stage: int, configure: Callable[..., PretrainConfig], world: World
) -> None:
    """fp32, AdamW: a weight has 4 bytes, its moments 8, and from stage 1 on a master copy of 4."""
    config = configure(f"deepspeed.zero_stage={stage}")
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        count = sum(p.ds_numel if stage == 3 else p.numel() for p in engine.module.parameters())
        parts = measured(engine, world.device)
    assert parts.parameters == pytest.approx(4 * count, rel=0.02)
    assert parts.optimiser == pytest.approx((8 if stage == 0 else 12) * count, rel=0.02)
    assert parts.activations > 0


@pytest.mark.parametrize(
    ("largest", "ranks", "overrides", "advice"),
    [
        ("optimiser", 2, ["deepspeed.zero_stage=0"],
         "take deepspeed.zero_stage=1 or deepspeed.zero_stage=1 deepspeed.offload=optimizer;"),
        ("optimiser", 1, ["deepspeed.zero_stage=0"],
         "take more GPUs, over which deepspeed.zero_stage=1 divides it or "
         "deepspeed.zero_stage=1 deepspeed.offload=optimizer;"),
        ("optimiser", 2, [], "take more GPUs, over which ZeRO divides it or deepspeed.offload=optimizer;"),
        ("optimiser", 2, ["deepspeed.zero_stage=0", *ADAFACTOR], "take a device with more memory, or a smaller model;"),
        ("optimiser", 2, ["deepspeed.zero_stage=0", *MUON], "take deepspeed.zero_stage=1;"),
        ("optimiser", 2, MUON, "take more GPUs, over which ZeRO divides it;"),
        ("gradients", 2, ["deepspeed.zero_stage=1"], "take deepspeed.zero_stage=2;"),
        ("gradients", 1, ["deepspeed.zero_stage=1"], "take more GPUs, over which deepspeed.zero_stage=2 divides it;"),
        ("parameters", 2, [], "take deepspeed.zero_stage=3 or deepspeed.zero_stage=3 deepspeed.offload=all;"),
        ("parameters", 2, ["deepspeed.zero_stage=3", "deepspeed.offload=optimizer"],
         "take more GPUs, over which ZeRO divides it or deepspeed.offload=all;"),
        ("parameters", 2, ["deepspeed.zero_stage=3", "deepspeed.offload=all"],
         "take more GPUs, over which ZeRO divides it;"),
        ("parameters", 2, ["train.compile=true"], "take a device with more memory, or a smaller model;"),
        ("activations", 1, [], "take train.micro_batch_samples=1, which accumulates more or "
         "train.activation_checkpointing=true or shorter windows (data.sequence_tokens);"),
        ("activations", 2, LEAST,
         "take deepspeed.sequence_parallel=2, ranks that share a window or shorter windows (data.sequence_tokens);"),
        ("activations", 2, [*LEAST, "deepspeed.sequence_parallel=2"], "take shorter windows (data.sequence_tokens);"),
        ("activations", 2, [*LEAST, "data.sequence_tokens=30"], "take shorter windows (data.sequence_tokens);"),
    ],
)  # fmt: skip
def test_the_advice_is_for_the_largest_part_and_taken_by_the_config(
    largest: str, ranks: int, overrides: list[str], advice: str, tiny: dict[str, Any],
    configure: Callable[..., PretrainConfig], write_config: Callable[..., str], world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told = _told(largest, configure(*overrides), replace(world, size=ranks), monkeypatch)
    assert told.startswith("rank 0 ran out of memory in step 7 (training): of 43 GB at most, the largest part is ")
    assert "(40 GB; 1 GB " in told and advice in told
    for way in advice.removesuffix(";").split(" or "):
        load_run(write_config(tiny), re.findall(r"(?:train|deepspeed)\.\w+=\w+", way))


def test_dropout_of_adapters_is_not_told_to_recompute(
    tiny: dict[str, Any], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {"base": {"path": "base"}, "model": tiny["model"], "train": tiny["train"]}
    data = {"sequence_tokens": 32, "sources": [{"name": "toy", "files": ["toy.jsonl"]}]}
    for dropout, recomputed in ((0.0, True), (0.1, False)):
        adapter = {"kind": "lora", "dropout": dropout}
        config = TuneConfig.model_validate(blocks | {"data": data, "adapter": adapter})
        told = _told("activations", config, world, monkeypatch)
        assert "train.micro_batch_samples=1" in told
        assert ("train.activation_checkpointing=true" in told) == recomputed


def _told(largest: str, config: StageConfig, world: World, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sentence where ``largest`` takes 40 GB of 43."""
    sizes = dict.fromkeys(("parameters", "gradients", "optimiser", "activations"), 1e9) | {largest: 40e9}
    monkeypatch.setattr("trainer.monitor.out_of_memory.measured", lambda *_: Parts(**sizes))
    return out_of_memory(MemoryError(), object(), config, world, "in step 7 (training)", Path("runs/my"))
