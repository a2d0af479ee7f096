"""Forked ranks find everything heavy imported, or the whole suite takes minutes longer."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

from tests.ranks import Processes

FEW = 150


def _train_and_count(config: str) -> None:
    assert "deepspeed" in sys.modules and "mlflow" not in sys.modules  # the autotuner's, which nobody uses
    before = set(sys.modules)
    sys.argv = ["pretrain.train", config, "train.checkpoint.every_steps=4"]
    try:
        runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code == 0
    new = sorted(sys.modules.keys() - before)
    assert len(new) < FEW, new
    import mlflow

    assert mlflow.__file__


def test_a_forked_run_imports_next_to_nothing(tiny: dict[str, Any], write_config: Callable[..., str]) -> None:
    with Processes(_train_and_count, write_config(tiny)) as processes:
        assert processes.end() == [0], processes.output[-3000:]
