"""``python -m launch.doctor`` as a whole: the report of one process and of real ranks, and mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT
from tests.launching import run as launch
from trainer import precision


def test_a_ready_run_is_told_so(
    tiny: dict[str, Any], write_config: Callable[..., str], examined: Callable[..., tuple[int, str]]
) -> None:
    status, out = examined(write_config(tiny))
    assert status == 0, out
    assert "ok       data" in out and "tokenizer and model agree on 400 ids" in out
    assert "checking; torch takes some seconds to load\n" in out
    assert "error" not in out and out.splitlines()[-1]


def test_json_is_for_scripts(examined: Callable[..., tuple[int, str]]) -> None:
    status, out = examined("--json")
    findings = json.loads(out)
    assert status == int(any(f["level"] == "error" for f in findings))
    assert {"python", "packages", "disk", "write speed", "port"} <= {f["check"] for f in findings}
    assert all(
        set(f) == {"check", "level", "found", "remedy"} and (f["remedy"] or f["level"] == "ok") for f in findings
    )


def test_two_ranks_make_one_report(tiny: dict[str, Any], write_config: Callable[..., str], tmp_path: Path) -> None:
    """With what only ranks can find out, and without the machine's findings twice."""
    done = launch("launch.doctor", "--local_rank=0", write_config(tiny), processes=2)  # deepspeed gives that argument
    assert done.returncode == 0, done.stdout
    for line in ("2 ranks on 1 host, cpu", "the same on all 2 ranks", "GB/s a rank", "within ", "2 micro-batches of 2"):
        assert done.stdout.count(line) >= 1, done.stdout
    assert done.stdout.count("ok       python") == 1


def test_it_tells_what_auto_is_here_and_warns_of_slow_bf16(
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    examined: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "fast_bf16", lambda *_: (False, "this CPU is slow"))
    path = write_config(tiny)
    assert "train.precision auto is fp32: this CPU is slow" in examined(path, "train.precision=auto")[1]
    out = examined(path, "train.precision=bf16")[1]
    assert "warning" in out and "train.precision bf16 is slow: this CPU is slow" in out
    assert "train.precision" not in examined(path, "train.precision=fp32")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("configs/skip_2b.yaml",), "config file configs/skip_2b.yaml does not exist"),
        (("configs/demo.yaml", "deepspeed.zero=3"), "did you mean"),
        (("configs/demo.yaml", "train.steps"), "must look like key.sub=value"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: tuple[str, ...],
    sentence: str,
    examined: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    status, out = examined(*arguments)
    assert status == 1 and sentence in out and out.startswith("error: ") and len(out.splitlines()) == 1
