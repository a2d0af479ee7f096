"""Shared windows are measured beside windows of their own; balance against arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.sequence import balance
from tests.ranks import Processes
from trainer.config import load_run


def test_every_length_is_measured(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> None:
    tiny["train"]["global_batch_samples"] = 2
    tiny["train"]["micro_batch_samples"] = 1
    out = tmp_path / "sequence.json"
    with Processes(
        "bench.sequence", write_config(tiny), "--tokens", "32", "64", "--rounds", "2", "--out", out, count=2
    ) as ranks:
        assert ranks.end() == [0, 0], ranks.output[-3000:]
    rows = json.loads(out.read_text())
    assert [(row["tokens"], row["shared"]) for row in rows] == [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert all(len(row["seconds"]) == 2 and row["peak_bytes"] > row["kept_bytes"] > 0 for row in rows)
    assert all(2 * two["kept_bytes"] < 1.5 * one["kept_bytes"] for one, two in (rows[:2], rows[2:]))
    assert [row["balance"] == 1 for row in rows] == [True, False, True, False]
    assert re.search(r"2 ranks, 2 windows a step\ntokens  ranks a window +time", ranks.output)


def test_stretches_from_both_ends_balance_what_stretches_in_order_do_not(
    tiny: dict[str, Any], write_config: Callable[..., str]
) -> None:
    config = load_run(write_config(tiny), ["data.sequence_tokens=128", "model.router=null"])
    keys = torch.arange(1, 129)
    none = torch.zeros(0, 128, dtype=torch.bool)
    assert balance(config, none, keys, 1) == 1
    # Two stretches of a rank see 129 keys a pair of tokens, whichever they are: exactly equal.
    assert balance(config, none, keys, 2) == pytest.approx(1) == balance(config, none, keys, 4)
    assert balance(config, none, keys, 4, in_order=True) > balance(config, none, keys, 2, in_order=True) > 1.02
