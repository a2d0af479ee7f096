"""Defaults go by device, and every option that cannot be run is refused in one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common.options import (
    CPU_SIZES,
    CUDA_SIZES,
    MODEL,
    add_densities,
    add_numbers,
    add_run,
    parser,
    refuse,
    resolve,
)


def _options(*arguments: str) -> argparse.Namespace:
    options_parser = parser("bench.some", "Some benchmark.")
    add_numbers(options_parser, MODEL)
    add_densities(options_parser)
    add_run(options_parser, repeats=3)
    return options_parser.parse_args(arguments)


def _resolved(*arguments: str) -> argparse.Namespace:
    options = _options(*arguments)
    resolve(options, CPU_SIZES, CUDA_SIZES)
    return options


def test_defaults_of_the_cpu() -> None:
    options = _resolved("--device=cpu", "--layers=7")
    assert {name: getattr(options, name) for name in CPU_SIZES} == CPU_SIZES | {"layers": 7}
    assert (options.dtype, options.repeats, options.other_sizes) == ("fp32", 3, ["layers"])
    assert _resolved("--device=cpu", "--layers=12", "--dtype=bf16").other_sizes == ["dtype"]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_defaults_of_cuda() -> None:
    for arguments in ([], ["--device=cuda"], ["--device=cuda:1"]):
        options = _resolved(*arguments)
        assert {name: getattr(options, name) for name in CUDA_SIZES} == CUDA_SIZES
        assert (options.dtype, options.other_sizes) == ("bf16", [])
    with pytest.raises(ValueError, match=r"--device cuda:2 is not there; this machine has 2"):
        _resolved("--device=cuda:2")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0", "cuda:"])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(ValueError, match=r"--device must be cpu or cuda \(or cuda:N\), got " + device):
        _resolved(f"--device={device}")


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _resolved().device == "cpu"
    with pytest.raises(ValueError, match="asks for a CUDA device, but there is none; use --device cpu"):
        _resolved("--device=cuda")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"kv_heads": 1}, "--kv-heads must be at least 2, got 1"),
        ({"batches": [4, 0]}, "--batches must be at least 1, got 0"),
        ({"batches": [4, 4]}, r"--batches must differ from each other, got \[4, 4\]"),
        ({"densities": [0.5, 0.5]}, "--densities must differ"),
        ({"densities": [1.5]}, "--densities must lie above 0 and not above 1, got 1.5"),
        ({"densities": [0.0]}, "--densities must lie above 0 and not above 1, got 0"),
        ({"densities": [float("nan")]}, "--densities must lie above 0 and not above 1, got nan"),
        (
            {"json": Path("no/such/folder/rows.json")},
            "there is no folder no/such/folder to write rows.json in; create it, or give another --json",
        ),
        ({"markdown": Path("no/such/folder/table.md")}, "there is no folder no/such/folder to write table.md in"),
        ({"json": Path(".")}, r"--json \. is a folder; give the name of a file"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    options = argparse.Namespace(**{"repeats": 1, "kv_heads": 2, "batches": [1], "densities": [0.5], **changes})
    with pytest.raises(ValueError, match=sentence):
        refuse(options, {"kv_heads": 2, "batches": 1})


def test_what_can_be_run_is_not_refused(tmp_path: Path) -> None:
    options = argparse.Namespace(repeats=1, kv_heads=2, densities=[1.0, 0.1], json=tmp_path / "rows.json")
    refuse(options, {"kv_heads": 2})
