"""``python -m bench.gpu``: a rehearsal on the CPU, and what is refused."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from bench.gpu import __main__ as command
from bench.gpu import parts, summary
from tests.bench.toy import refused
from tests.launching import ROOT, environment


def test_a_rehearsal_leaves_a_summary_with_figures_of_every_part(tmp_path: Path) -> None:
    """The parts that take seconds; the others' commands have tests of their own."""
    out = tmp_path / "gpu"
    out.mkdir()
    words = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--out", str(out), "--minutes", "4"]
    words += ["--only", "profile", "facts", "attention"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"GPU check: 3 of 3 parts passed; see {out / summary.MARKDOWN}"
    found = json.loads((out / summary.JSON).read_text())
    assert [(part["name"], part["status"]) for part in found["parts"]] == [
        ("facts", "passed"),
        ("attention", "passed"),
        ("profile", "passed"),
    ]
    facts, attention, profile = (part["figures"] for part in found["parts"])
    assert "torch" in facts["key"] and {row["fact"] for row in facts["rows"]} >= {"deepspeed", "bf16 product"}
    assert "64: hf_llama" in attention["key"] and len(attention["rows"]) == 6
    assert 5 < len(profile["rows"]) <= 20 and any("aten::" in row["name"] for row in profile["rows"])
    with gzip.open(out / "profile-trace.json.gz", "rt") as file:
        assert json.load(file)["traceEvents"]
    page = (out / summary.MARKDOWN).read_text()
    assert "# GPU check: 3 of 3 parts passed\n" in page and "a rehearsal with tiny sizes" in page
    names = {"facts", "attention", "profile"}
    files = {summary.JSON, summary.MARKDOWN, "profile-trace.json.gz"}
    assert {path.name for path in out.iterdir()} == files | {f"{n}.{end}" for n in names for end in ("log", "json")}


def _main(words: list[str]) -> None:
    raise SystemExit(command.main(words))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--minutes", "0"], "--minutes must be a number above 0, got 0"),
        (["--minutes", "nan"], "--minutes must be a number above 0, got nan"),
        (["--only", "decoding"], "--only decoding: there is no such part; the parts are facts, tests, training, step-"),
        (["--out", "{folder}/file"], "must be a folder, but is a file; give another name"),
        (["--out", "{folder}"], "holds something other than an earlier summary; give another folder"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = [word.replace("{folder}", str(tmp_path)) for word in words]
    assert sentence in refused(_main, words, capsys)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """No part is started; a signal comes, or all have passed."""

    def replace(signal: int) -> None:
        def run(schedule: object) -> None:
            schedule.signal = signal  # type: ignore[attr-defined]
            for outcome in schedule.outcomes:  # type: ignore[attr-defined]
                outcome.status = "not reached" if signal else "passed"
            schedule._tell(schedule)  # type: ignore[attr-defined]

        monkeypatch.setattr("bench.gpu.schedule.Schedule.run", run)

    return replace


def test_what_the_tests_lack_is_told_first(
    nothing_runs: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nothing_runs(0)

    def only_pytest(name: str) -> str:
        if name != "pytest":
            raise PackageNotFoundError(name)
        return "9"

    monkeypatch.setattr(parts, "version", only_pytest)
    assert command.main(["--out", str(tmp_path / "gpu")]) == 0
    sentence = "the part tests will fail, as pytest-timeout, pytest-xdist are not installed: "
    assert f"note: {sentence}" in capsys.readouterr().out.splitlines()[0]
    assert sentence in (tmp_path / "gpu" / summary.MARKDOWN).read_text()
    assert command.main(["--out", str(tmp_path / "gpu"), "--only", "decode"]) == 0
    assert "note: " not in capsys.readouterr().out


def test_an_earlier_folder_is_kept_and_the_status_is_the_signals(
    nothing_runs: Callable[[int], None], tmp_path: Path
) -> None:
    nothing_runs(0)
    out = tmp_path / "gpu"
    assert command.main(["--out", str(out)]) == 0
    nothing_runs(15)
    assert command.main(["--out", str(out)]) == 143
    earlier, newest = sorted(tmp_path.iterdir(), key=lambda path: path.name, reverse=True)
    assert newest == out and earlier.name.startswith("gpu-before-")
    statuses = {path: json.loads((path / summary.JSON).read_text())["parts"][0]["status"] for path in (earlier, newest)}
    assert statuses == {earlier: "passed", newest: "not reached"}
