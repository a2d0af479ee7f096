"""Started alone on a machine with GPUs, launch.doctor tells the memory of a run on all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from launch.configs import load_either
from launch.doctor import storage
from launch.doctor.__main__ import diagnose
from launch.plan.memory_model import CONTEXT_BYTES, GIB
from trainer.distributed import ALONE

LARGE = ["model.width=2048", "model.ffn_width=8192", "model.heads=16", "model.layers=16"]


@pytest.fixture
def found(
    tiny: dict[str, Any], write_config: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], dict[str, str]]:
    """What the doctor finds on a large model, by check."""
    monkeypatch.setattr(storage, "PROBE_BYTES", 2**20)

    def call() -> dict[str, str]:
        findings = diagnose(load_either(write_config(tiny), LARGE), None, ALONE)
        return {finding.check: finding.found for finding in findings}

    return call


def test_all_gpus_are_the_ranks(found: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "small")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (GIB, GIB))
    findings = found()
    told = re.fullmatch(r".* trained; about ([\d.]+) GiB a GPU at ZeRO 2 on 8 ranks", findings["model"])
    needed = re.search(r"the config needs about ([\d.]+)$", findings["gpus"])
    assert told and needed
    assert float(told[1]) - float(needed[1]) == pytest.approx(CONTEXT_BYTES / GIB, abs=0.11)  # both are rounded


def test_told_to_use_the_cpu_it_is_one_rank(
    found: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    findings = found()
    assert findings["model"].endswith(" GiB a process on this CPU at ZeRO 2 on 1 rank") and "gpus" not in findings
