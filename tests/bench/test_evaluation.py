"""The evaluation benchmark at toy size: both sides agree, and the limits are judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from bench.evaluation import main, questions
from tests.bench.toy import MODEL, RUN

TOY = [*RUN, *MODEL, "--questions", "3", "--peer-batches", "2"]


def test_a_line_a_kind_and_a_judgement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as ended:  # toys are no measure, but something is judged
        raise SystemExit(main([*TOY, "--json", str(out), "--check"]))
    printed = capsys.readouterr()
    found = json.loads(out.read_text())
    assert found.keys() == {"evaluation/choices", "evaluation/yes_or_no"} and all(value > 0 for value in found.values())
    missed = [name for name, value in found.items() if value < 1]
    assert ended.value.code == (1 if missed else 0) and all(name in printed.err for name in missed)
    assert "choices    12 requests, " in printed.out and "yes or no  6 requests, " in printed.out


def test_requests_are_those_of_tasks() -> None:
    assert questions("choices", 2, 50) == questions("choices", 2, 50)
    assert [len(choice) for _, _, choice in questions("yes or no", 3, 50)] == [1] * 6


def test_what_cannot_be(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        main(["--questions", "0"])
    assert "--questions must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "lm_eval is not installed; install it with: " in capsys.readouterr().err
