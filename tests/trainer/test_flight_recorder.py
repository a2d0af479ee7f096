"""NCCL's flight recorder is on before ranks meet, and what it has is in the run folder after a stall."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer import flight_recorder
from trainer.monitor.watchdog import Watchdog
from trainer.run_folder import RunFolder


def test_it_is_on_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    flight_recorder.enable(tmp_path / "run", environment)
    assert environment == {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "run/flight/rank-"),
    }
    old = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    flight_recorder.enable(None, old)
    assert old == {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    assert (tmp_path / "run/flight").is_dir()


@pytest.fixture
def on_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")


def test_gloo_has_none(tmp_path: Path) -> None:
    assert flight_recorder.dump(tmp_path, 0) is None and not list(tmp_path.iterdir())


def test_one_that_hangs_or_is_missing_holds_nothing_up(
    tmp_path: Path, on_nccl: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(flight_recorder, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(flight_recorder, "_recorded", lambda: b"late" if never.wait() else b"")
    assert flight_recorder.dump(tmp_path, 0) is None
    never.set()
    monkeypatch.undo()
    if not hasattr(dist.distributed_c10d, "ProcessGroupNCCL"):  # a CPU build of torch has no such function
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
        assert flight_recorder.dump(tmp_path / "other", 0) is None


def test_a_stall_writes_it_and_says_where(tmp_path: Path, on_nccl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    monkeypatch.setattr(flight_recorder, "_recorded", lambda: b"entries of rank 3")
    run = RunFolder(tmp_path, 3)
    for folder in (run.heartbeat.path.parent, run.log.parent):
        folder.mkdir()
    watchdog = Watchdog(run, 900, lambda: True, 4)
    monkeypatch.setattr(watchdog, "_say", said.append)
    watchdog._end()
    watchdog._file.close()
    assert (tmp_path / "flight/rank-3").read_bytes() == b"entries of rank 3"
    (sentence,) = said
    assert sentence.endswith(f"NCCL's last collectives are in {tmp_path / 'flight/rank-3'}")
