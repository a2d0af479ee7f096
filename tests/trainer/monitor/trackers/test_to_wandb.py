"""Weights & Biases offline: what a run and its resume leave in the files that ``wandb sync`` sends."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.exit_status import EXIT_PREEMPTED
from trainer.log import logger_of_run

wandb = pytest.importorskip("wandb", reason="needs wandb: pip install -r requirements-dev.txt")

_BLOCK = 32768
_FULL, _LAST = 1, 4


def _records(path: Path) -> Iterator[Any]:
    """The protobuf records of a ``.wandb`` file, which is a LevelDB log behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def _read(folder: Path) -> dict[str, Any]:
    """Id, project, config, rows of the history, files and exit status of one offline run."""
    (path,) = folder.glob("*.wandb")
    found: dict[str, Any] = {"config": {}, "rows": [], "files": set()}
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = record.history.item
            found["rows"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif kind == "files":
            found["files"] |= {file.path for file in record.files.files}
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _whole(folder: Path) -> dict[str, Any]:
    """As soon as the library's own process has written the last record."""
    deadline_s = time.monotonic() + 30
    while "exit" not in (found := _read(folder)):
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)
    return found


def test_a_run_and_its_resume_are_one_offline_run(
    tiny: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()  # the library keeps what it has read of the environment
    run = Path(tiny["train"]["run_dir"])
    tiny["train"]["log"] |= {"images": True, "trackers": ["tensorboard", "wandb"], "project": "hops"}
    assert train_here(tiny, "train.stop_at_step=2") == 0
    assert train_here(tiny, "train.checkpoint.resume=required") == 0
    first, second = (_whole(folder) for folder in sorted((run / "wandb").glob("offline-run-*")))
    assert first["id"] == second["id"] == json.loads((run / "trackers.json").read_text())["wandb"]
    assert (first["project"], first["name"], first["exit"]) == ("hops", "run", 0)
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert second["config"]["train"]["optimizer"] == resolved["train"]["optimizer"]
    assert {f"run/{name}" for name in ("config.yaml", "metrics.jsonl", "logs/rank-0.log")} <= second["files"]
    assert any(name.startswith("media/images/routing") for name in first["files"])

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sent: dict[int, dict[str, Any]] = {}
    for row in [*first["rows"], *second["rows"]]:
        sent.setdefault(row["step"], {}).update(row)
    for line in lines:
        there = {name: value for name, value in line.items() if value is not None}
        assert {name: sent[line["step"]][name] for name in there} == there
    assert any(name.startswith("routing") for name in sent[4])


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trainer.monitor.trackers import to_wandb
    from trainer.monitor.trackers.interface import Opening

    monkeypatch.setattr(to_wandb, "_INIT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(logger_of_run(), "propagate", True)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        wandb.teardown()
        tracker = to_wandb.ToWandb()
        tracker.open(Opening(tmp_path, "hops", {"seed": 1}, None, None))
        tracker.scalars(3, 1e9, {"train/loss": 2.0})
        tracker.close("stopped")
    said = [record.message for record in caplog.records if record.name == logger_of_run().name]
    (told,) = {message for message in said if message.startswith("tracker wandb: ")}
    assert told.endswith(f"; the run is kept in {tmp_path / 'wandb'}, to be sent with `wandb sync`")
    found = _whole(next((tmp_path / "wandb").glob("offline-run-*")))
    assert found["exit"] == EXIT_PREEMPTED and found["rows"][0]["train/loss"] == 2.0
