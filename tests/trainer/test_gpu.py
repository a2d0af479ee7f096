"""On a CUDA device: every ZeRO stage trains in bf16 and fp16, routed like the CPU does, and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.launching import run

pytestmark = pytest.mark.gpu
TRAIN = "pretrain.train"


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_precision_trains_and_resumes(tiny, write_config, stage, precision):
    if stage == 0 and precision == "fp16":
        pytest.skip("refused by the config: DeepSpeed does not scale the loss at stage 0")
    tiny["train"]["precision"] = precision
    tiny["deepspeed"]["zero_stage"] = stage
    config = write_config(tiny)
    done = run(TRAIN, config, device="cuda")
    assert done.returncode == 0, done.stdout[-3000:]
    more = run(TRAIN, config, "train.steps=6", "train.checkpoint.resume=required", device="cuda")
    assert more.returncode == 0 and "at step 4" in more.stdout, more.stdout[-3000:]
    lines = [json.loads(x) for x in (Path(tiny["train"]["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation/code/loss"] for line in lines if "validation/code/loss" in line]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
