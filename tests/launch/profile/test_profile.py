"""The page on a profile: from a made-up trace of a GPU whose figures are known, and from a real one of two ranks."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.profile.__main__ import main
from launch.profile.report import by_phase, by_site
from launch.profile.trace import Place, Reader, read
from tests.launching import run

MAIN, AUTOGRAD = 1, 2


def _event(kind: str, name: str, start: float, length: float, thread: Any = MAIN, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "tid": thread, "args": args}


def _range(name: str, start: float, length: float) -> dict[str, Any]:
    return _event("user_annotation", name, start, length)


def _memory(at: float, size: int, address: int) -> dict[str, Any]:
    arguments = {"Bytes": size, "Addr": address, "Device Type": 1}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": at, "tid": MAIN, "args": arguments}


def _on_a_gpu() -> list[dict[str, Any]]:
    """Two steps' worth of one: data, then forward through a layer's attention, backward in autograd's thread."""
    engine = "autograd::engine::evaluate_function: "
    events = []
    for start in (0.0, 1000.0):
        sequence, one = int(start) + 7, int(start)
        events += [
            _range("data", start, 100),
            _range("step", start + 100, 900),
            _range("forward", start + 100, 300),
            _range("layer-00", start + 110, 200),
            _range("layer-00 attention", start + 120, 100),
            _event("cpu_op", "aten::linear", start + 130, 60, **{"External id": one + 1, "Sequence number": sequence}),
            _event("cpu_op", "aten::mm", start + 140, 40, **{"External id": one + 2, "Sequence number": sequence}),
            _range("backward", start + 400, 500),
            _event(
                "cpu_op", f"{engine}MmBackward0", start + 450, 50, AUTOGRAD,
                **{"External id": one + 3, "Sequence number": sequence},
            ),
            _event("cpu_op", "aten::mm", start + 460, 30, AUTOGRAD, **{"External id": one + 4}),
            _event("cpu_op", f"{engine}torch::autograd::AccumulateGrad", start + 510, 20, AUTOGRAD),
            _range("optimiser", start + 900, 50),
            _event("cuda_runtime", "cudaStreamSynchronize", start + 920, 20),
            _event("kernel", "gemm", start + 200, 150, "stream 7", **{"External id": one + 2}),
            _event("kernel", "gemm", start + 500, 250, "stream 7", **{"External id": one + 4}),
            _event("kernel", "ncclDevKernel_AllReduce", start + 600, 200, "stream 8", **{"External id": one + 3}),
            _memory(start + 150, 3000, one + 10),  # alive at the second's backward, too
            _memory(start + 470, 500, one + 20),
            _memory(start + 480, -500, one + 20),
        ]  # fmt: skip
    return events


def test_every_kernel_operator_and_byte_has_its_place() -> None:
    sums = Reader(_on_a_gpu()).sums
    attention = Place("step", "forward", "layer-00 attention")
    back = Place("step", "backward", "layer-00 attention")
    assert (sums.steps, sums.wall, sums.in_steps) == (2, 2000, 1800)
    assert sums.kernels == {attention: 300, back: 2 * (250 + 200)}
    assert sums.busy == 2 * (150 + 300)  # the two streams' overlap counts once
    assert sums.by_place[attention] == 2 * 100 and sums.by_place[back] == 2 * 50
    assert sums.by_place[Place("step", "backward", "gradients")] == 2 * 20
    assert sums.by_place[Place("step", "forward", "layer-00")] == 2 * (200 - 100)
    assert sums.by_place[Place("step", "optimiser", "")] == 2 * 50
    assert sums.waiting == {"the device": 40, "collectives": 400}
    assert sums.by_operator["aten::mm"] == (2 * 40 + 2 * 30, 4) and sums.by_kernel["gemm"] == (800, 4)
    assert sums.allocated[attention] == 6000 and sums.allocated[Place("step", "backward", "")] == 1000
    assert sums.held == {attention: 6000, Place("step", "backward", ""): 500}


def test_rows_are_of_one_step() -> None:
    sums = Reader(_on_a_gpu()).sums
    phases = {row.name: row for row in by_phase(sums)}
    assert list(phases) == ["data", "forward", "backward", "optimiser", "rest of the step"]
    assert (phases["data"].cpu_ms, phases["forward"].gpu_ms, phases["backward"].gpu_ms) == (0.1, 0.15, 0.45)
    sites = {row.name: row for row in by_site(sums)}
    assert sites["layers: attention"].gpu_ms == 0.6 and sites["layers: attention"].allocated_mb == 0.003
    assert "layer-00 attention" in {row.name for row in by_site(sums, each_layer=True)}


def _write(run_dir: Path, events: list[dict[str, Any]], rank: int = 0) -> Path:
    path = run_dir / f"profile/rank-{rank}.pt.trace.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return path


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch.profile", *arguments])
    try:
        return main()
    except SystemExit as end:
        return int(str(end.code))


def test_the_page_and_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, _on_a_gpu())
    assert _call(monkeypatch, str(tmp_path), "--json", str(tmp_path / "rows.json")) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: 2 steps of 0.9 ms, the GPU busy for 45% of the time\n")
    assert "waiting: data 10.0%, the device 2.0%, collectives 20.0%, Python between operators" in out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows["steps"] == 2 and {row["name"] for row in rows["sites"]} >= {"layer-00 attention", "gradients"}


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert _call(monkeypatch, str(tmp_path), *arguments) == 1
        return capsys.readouterr().err

    assert "has no trace in profile/; run it with train.profile.steps=[20,25]" in refused()
    path = _write(tmp_path, _on_a_gpu(), rank=3)
    assert "has no trace of rank 0; give --rank one of 3" in refused()
    _write(tmp_path, [_event("cpu_op", "aten::mm", 0, 1)])
    assert "the trace has none of Hopscotch's phases" in refused()
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read as a trace" in refused("--rank", "3")


def test_a_real_trace_of_every_rank(tiny, write_config, monkeypatch, capsys) -> None:
    """Times of phases add up to the time of the steps, and hardly anything has no site."""
    config, run_dir = write_config(tiny), Path(tiny["train"]["run_dir"])
    done = run("pretrain.train", config, "train.profile.steps=[2,3]", "train.checkpoint.every_steps=3", processes=2)
    assert done.returncode == 0, done.stdout[-2000:]
    for rank in (0, 1):
        assert _call(monkeypatch, str(run_dir), "--rank", str(rank)) == 0
        out = capsys.readouterr().out
        phases = re.findall(r"^(data|forward|backward|optimiser|tracker|rest of the step|save|evaluate) ", out, re.M)
        assert len(phases) >= 7
        assert "layers: attention" in out and "head and loss" in out and "collectives" in out
    sums = Reader(read(run_dir / "profile/rank-0.pt.trace.json.gz")).sums
    assert sums.steps == 2
    assert sum(sums.by_place.values()) == pytest.approx(sums.wall, rel=0.02)
    backward = {place.site for place in sums.by_place if place.part == "backward"}
    assert {"layer-00 attention", "layer-01 ffn", "layer-02 router", "head and loss", "gradients"} <= backward
