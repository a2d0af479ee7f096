"""Which devices jobs side by side get; what becomes of the jobs is in the tests of ``bench/isoflop``."""

from __future__ import annotations

import pytest
import torch

from bench.common.jobs import device_sets


def test_jobs_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_sets(2, 3) == [None, None] or torch.cuda.is_available()
    monkeypatch.setattr("trainer.deepspeed_internals.uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_sets(2, 2) == ["0,1", "2,3"]
    assert device_sets(3, 2) == ["0,1", "2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert device_sets(4, 1) == ["4", "5", "6", "7"]
    with pytest.raises(ValueError, match="--ranks 5 needs as many GPUs, but there are 4"):
        device_sets(1, 5)
