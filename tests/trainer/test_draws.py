"""A fresh start draws each weight once in the whole job; where weights are read none is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.flops import parameter_counts
from tests.ranks import Processes
from tests.trainer.draw_worker import train


@pytest.mark.parametrize("stage", [2, 3])
def test_numbers_drawn(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path, stage: int) -> None:
    tiny["train"] |= {"steps": 2, "checkpoint": {"every_steps": 1}, "evaluation": {"every_steps": 2, "samples": 1}}
    tiny["deepspeed"]["zero_stage"] = stage
    config = write_config(tiny)

    def counts(name: str, *overrides: str) -> list[int]:
        with Processes(train, str(tmp_path / name), config, *overrides, count=2) as ranks:
            assert ranks.status(240) == 0, ranks.output
        return [json.loads((tmp_path / f"{name}-{rank}").read_text()) for rank in (0, 1)]

    model = ModelConfig.model_validate(tiny["model"])
    norms = (2 * model.layers + 1) * model.width  # ones
    fresh = counts("fresh", "train.stop_at_step=1")
    assert sum(fresh) == parameter_counts(model)["total"] - norms and all(fresh)
    assert counts("resumed", "train.checkpoint.resume=required") == [0, 0]
    init = f"init={{path: {tiny['train']['run_dir']}}}"
    given = counts("given", init, f"train.run_dir={tmp_path / 'given-run'}", "train.stop_at_step=1")
    assert sum(given) == 2 * model.width * model.layers  # routers, in case the weights have none
