"""Generators are saved and put back; with ``DS_ACCELERATOR=cpu`` a GPU that is there stays untouched."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from trainer.checkpoints.rng import rng_state, set_rng_state

GPU_STATE = torch.arange(16, dtype=torch.uint8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with a GPU, as far as PyTorch says; returns what has been asked of it."""
    asked: list[str] = []

    def put_back(state: torch.Tensor) -> None:
        assert torch.equal(state, GPU_STATE)
        asked.append("set_rng_state")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: asked.append("get_rng_state") or GPU_STATE)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put_back)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    return asked


def _draw() -> tuple[float, ...]:
    return float(torch.rand(())), random.random(), float(np.random.random())


def test_generators_go_on_where_they_were() -> None:
    state = rng_state()
    drawn = _draw()
    assert _draw() != drawn
    set_rng_state(state)
    assert _draw() == drawn


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_saves_and_resumes_without_it(
    tiny: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch, gpu: list[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert train_here(tiny, "train.stop_at_step=2") == 0
    assert train_here(tiny, "train.checkpoint.resume=required") == 0
    assert gpu == []


def test_a_state_goes_from_a_gpu_to_a_cpu_and_back(monkeypatch: pytest.MonkeyPatch, gpu: list[str]) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    on_gpu = rng_state()
    set_rng_state(on_gpu)
    assert gpu == ["get_rng_state", "set_rng_state"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    drawn = _draw()
    set_rng_state(on_gpu)
    assert _draw() == drawn
    on_cpu = rng_state()
    monkeypatch.delenv("DS_ACCELERATOR")
    drawn = _draw()
    set_rng_state(on_cpu)
    assert _draw() == drawn and gpu == ["get_rng_state", "set_rng_state"]
