"""ZeRO++'s hpZ keeps a second copy of every part in a node. A resume at another size must not leave it as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launching import run
from tests.logged import losses_of

HPZ = "deepspeed.extra={zero_optimization: {zero_hpz_partition_size: 2}}"


def test_the_first_step_after_a_resume_at_another_size_has_the_saved_weights(
    tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path
) -> None:
    """The rate is such that other weights, as those of a fresh start, have another loss at once."""
    tiny["train"] |= {"steps": 6, "checkpoint": {"every_steps": 4}}
    tiny["train"]["log"] |= {"every_steps": 1}
    tiny["deepspeed"]["zero_stage"] = 3
    config, folder = write_config(tiny), Path(tiny["train"]["run_dir"])
    straight = run("pretrain.train", config, "train.optimizer.lr=0.02")
    assert straight.returncode == 0, straight.stdout[-3000:]
    shutil.rmtree(folder / "checkpoints/step-00000006")
    found = losses_of(folder)
    again = run("pretrain.train", config, "train.optimizer.lr=0.02", "train.checkpoint.resume=auto", HPZ, processes=2)
    assert again.returncode == 0, again.stdout[-3000:]
    assert "step 4 (ranks 1 there and 2 here" in again.stdout
    resumed = losses_of(folder)
    assert [resumed[step] for step in (5, 6)] == pytest.approx([found[step] for step in (5, 6)], rel=1e-3)
    assert abs(found[1] - found[5]) > 0.05  # the weights have moved by far more than that
