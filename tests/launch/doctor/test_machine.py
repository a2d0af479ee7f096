"""What the doctor says of this machine: Python, packages, CUDA, compilers, locks, limits and the port."""

from __future__ import annotations

import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.doctor import machine
from tests.launch.doctor.helpers import only, program
from trainer.config_blocks import TrainConfig


def test_an_old_python_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(machine.python()).level == "ok"
    monkeypatch.setattr(machine, "PYTHON", (9, 0))
    assert (only(machine.python()).level, only(machine.python()).remedy) == ("error", "make setup PYTHON=python9.0")


def test_packages_are_compared_with_the_requirements(tmp_path: Path) -> None:
    assert only(machine.packages()).level in ("ok", "warning")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# a comment\ntorch==1.0\nno-such-package==1.2\n")
    missing, other = machine.packages(requirements)
    assert missing.level == "error" and missing.remedy.endswith("pip install no-such-package==1.2")
    assert other.level == "warning" and "(tested: 1.0)" in other.found
    requirements.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    assert only(machine.packages(requirements)).level == "ok"


@pytest.mark.parametrize(
    ("driver", "built", "level", "words"),
    [
        ("12.4", None, "error", "this torch is a CPU build"),
        ("12.4", "13.0", "error", "torch needs CUDA 13.0, but the driver supports up to 12.4"),
        ("13.0", "12.8", "error", "torch sees no GPU though the driver is there (CUDA_VISIBLE_DEVICES is '')"),
        (None, "12.8", "warning", "no NVIDIA driver here"),
        (None, None, "ok", "no NVIDIA driver here"),
    ],
)
def test_torch_is_compared_with_the_driver(
    driver: str | None, built: str | None, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver is not None:
        program(tmp_path, "nvidia-smi", f"echo '| NVIDIA-SMI 550.1  Driver Version: 550.1  CUDA Version: {driver} |'")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = only(machine.cuda())
    assert finding.level == level and words in finding.found
    assert bool(finding.remedy) == (level != "ok")


def test_free_gpu_memory_is_compared_with_the_plan() -> None:
    gib = 2**30
    assert machine.judge_gpu("0: H100", 78 * gib, 80 * gib, 60.0 * gib).level == "ok"
    assert "another process" in machine.judge_gpu("0: H100", 60 * gib, 80 * gib, None).found
    short = machine.judge_gpu("0: H100", 40 * gib, 80 * gib, 60.0 * gib)
    assert short.level == "error" and "40.0 of 80.0 GiB free; the config needs about 60.0" in short.found
    assert list(machine.gpus(1.0)) == []  # no GPU, nothing to say


def test_a_compiler_is_asked_for_only_where_something_is_compiled(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainConfig.model_validate(tiny["train"])
    assert list(machine.compiler(None)) == list(machine.compiler(plain)) == []
    compiled = plain.model_copy(update={"compile": True})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    missing = only(machine.compiler(compiled))
    assert missing.level == "error" and "train.compile" in missing.found
    program(tmp_path, "clang++", "")
    assert only(machine.compiler(compiled)).level == "ok"


def test_locks_of_killed_builds_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert only(machine.locks()).level == "ok"
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert only(machine.locks()).level == "warning"
    os.utime(lock, (time.time() - 3600,) * 2)
    stale = only(machine.locks())
    assert stale.level == "error" and stale.remedy == f"rm {lock}" and "60 min old" in stale.found


def test_limits_that_are_too_low_are_warnings() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        low = only(machine.limits())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert low.level == "warning" and low.found.startswith("at most 512") and low.remedy.startswith("ulimit -n ")
    assert machine.judge_shared_memory(64 * 2**20).level == "warning"
    assert machine.judge_shared_memory(8 * 2**30).level == "ok"


def test_a_taken_port_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        taken = only(machine.port())
    assert taken.level == "warning" and "--master_port" in taken.remedy
    assert only(machine.port()).level == "ok"
