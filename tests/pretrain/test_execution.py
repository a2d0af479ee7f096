"""Ways of executing the same run: static capacity, compiled layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from tests.launching import run
from tests.logged import steps_of
from tests.ranks import Ranks

TRAIN = "pretrain.train"


def _lines(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(steps_of(config["train"]["run_dir"]).values())


def test_a_capacity_holds_in_training_and_its_overflow_is_logged(tiny, write_config):
    tiny["data"]["sequence_tokens"] = tiny["model"]["max_positions"] = 256
    tiny["model"]["router"] |= {"execution": "capacity", "capacity_factor": 1.0}
    done = run(TRAIN, write_config(tiny), processes=2)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "capacity execution" in done.stdout
    lines = _lines(tiny)
    assert len(lines) == 4 and lines[0]["density/overflow"] > 0
    for line in lines:
        densities = [line[f"density/layer-{layer:02d}"] for layer in range(3)]
        assert max(densities) <= 0.5  # 128 of 256 tokens of every window
    rounded = copy.deepcopy(tiny)
    rounded["train"]["run_dir"] += "-rounded"
    rounded["model"]["router"]["execution"] = "rounded"
    done = run(TRAIN, write_config(rounded), processes=2)
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(line["density/overflow"] == 0 for line in _lines(rounded))
    assert lines[0]["density/layer-00"] < _lines(rounded)[0]["density/layer-00"]  # the same weights, less room


def _trace_only() -> None:
    """In a rank: Dynamo and AOTAutograd as ever, but PyTorch runs their graphs; see ``tests/model/test_compile.py``."""

    def compile_layer(layer: nn.Module, dynamic: bool | None) -> None:
        print(f"traced a {type(layer).__name__}")
        traced(layer, dynamic=dynamic, backend="aot_eager")

    traced, nn.Module.compile = nn.Module.compile, compile_layer


def test_compiled_layers_train_as_plain_ones_do(tiny, write_config):
    tiny["train"]["evaluation"] = {"every_steps": 4, "samples": 4}  # as many a rank as in training: no further graphs
    losses = []
    for compiled in (False, True):
        config = copy.deepcopy(tiny)
        config["train"]["compile"] = compiled
        config["train"]["run_dir"] += f"-{compiled}"
        with Ranks(write_config(config), first=_trace_only) as ranks:
            assert ranks.end() == [0, 0], ranks.output[-3000:]
        assert ranks.output.count("traced a Block") == 2 * 3 * compiled  # ranks, layers
        losses.append([line["train/loss"] for line in _lines(config)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
