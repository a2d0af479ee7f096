"""The words before ``--module``: which GPUs the ``deepspeed`` launcher gives to ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.loop.ranks import hide_gpus
from tests.launching import ROOT, environment
from trainer.local_ranks import deepspeed_launcher, free_port, visible_gpus


def test_the_gpus_that_are_visible_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert deepspeed_launcher(2, 1, visible_gpus(2))[3:5] == ["--include", "localhost:2,3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert deepspeed_launcher(2, 1, visible_gpus(2))[3:5] == ["--num_gpus", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b,GPU-3c4d")
    with pytest.raises(
        ValueError, match="names GPUs as GPU-1a2b,GPU-3c4d, but the deepspeed launcher takes only numbers"
    ):
        deepspeed_launcher(2, 1, visible_gpus(2))


def test_ranks_on_the_cpu_see_no_gpu_though_the_launcher_names_some(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))")
    own = environment() | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [*deepspeed_launcher(2, free_port()), str(tmp_path / "rank.py")]
    done = subprocess.run(command, env=own, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    assert "'0,1'" in done.stdout  # else bench.loop.ranks need not hide any more
    own["CUDA_VISIBLE_DEVICES"] = "0,1"
    hide_gpus(own)
    assert own["CUDA_VISIBLE_DEVICES"] == ""
    on_gpus = {"CUDA_VISIBLE_DEVICES": "0,1"}
    hide_gpus(on_gpus)
    assert on_gpus == {"CUDA_VISIBLE_DEVICES": "0,1"}
