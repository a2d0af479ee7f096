"""A run's folder with lines in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from trainer.config import PretrainConfig
from trainer.run_folder import RunFolder


@pytest.fixture
def folder(
    tiny: dict[str, Any], configure: Callable[..., PretrainConfig], write_config: Callable[..., str]
) -> RunFolder:
    """The run's folder, with five logged steps, an evaluation at 2 and 4, and a line that a kill cut in half."""
    run = RunFolder(tiny["train"]["run_dir"], 0)
    run.create(configure(), write_config(tiny))
    density = {f"validation/code/density/layer-{layer:02d}": 0.1 * layer for layer in range(3)}
    lines: list[dict[str, Any]] = [{"step": s, "train/loss": 5.0 - s} for s in range(1, 6)]
    lines[1] |= {"validation/code/loss": 4.0, **density}
    lines[3] |= {"validation/code/loss": 3.0, **density}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "train/lo')
    return run
