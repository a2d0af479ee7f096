"""The bench of tuning steps at toy size: every method beside PEFT, from the same loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from bench import adapters
from tests.bench.toy import MODEL, refused

TOY = [*MODEL, "--layers", "4", "--tokens", "32", "--samples", "2", "--device", "cpu", "--repeats", "2"]


def test_a_row_for_every_method_and_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapters.main([*TOY, "--json", str(tmp_path / "seconds.json")]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [*adapters.METHODS, *adapters.PEERS]
    trained = {row[0]: int(row[1].replace(",", "")) for row in rows}
    assert trained["lora"] == trained["PEFT lora"] and trained["dora"] == trained["PEFT dora"]
    assert trained["late lora + ensemble, kept"] == trained["late lora + ensemble"]
    assert trained["ensemble only"] == 64 * 3 + 3 * 64 + 3  # norms, the final one among them; the router
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert all(len(seconds[name]) == 2 for name in trained)


def test_the_check_is_of_ours_beside_pefts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At toy size the time is of small operations, which says nothing: here it is given."""
    seconds = {name: [1.0] for name in adapters.METHODS} | {"PEFT lora": [2.0], "PEFT dora": [0.5]}
    monkeypatch.setattr(adapters, "take_turns", lambda *_: seconds)
    monkeypatch.setattr(adapters, "build", lambda *_: {name: SimpleNamespace(trained=1, step=None) for name in seconds})
    with pytest.raises(SystemExit) as ended:
        adapters.main([*TOY, "--check"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and "1 of 2 limits missed: tuning/dora is 2 (at most 1)" in err
    assert "ok     tuning/lora" in out and "MISSED tuning/dora" in out


def test_a_response_must_leave_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--response must lie between 0 and 1, got 1" in refused(adapters.main, [*TOY, "--response", "1"], capsys)
