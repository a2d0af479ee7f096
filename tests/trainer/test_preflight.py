"""What is said and refused before torch is imported; of a run's folder see ``tests/test_commands.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainer.preflight import open_model


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*none; give a run, a checkpoint or a folder of weights"):
        open_model(tmp_path / "none")
    (tmp_path / "my/checkpoints/step-00000064").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"weights; .*/my/checkpoints holds step-00000064$"):
        open_model(tmp_path / "my/checkpoints/step-00000020")


@pytest.mark.parametrize("terminal", [True, False])
def test_who_waits_at_a_terminal_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    open_model(tmp_path)
    said = f"{tmp_path}: reading; torch takes some seconds to load\n"
    assert capsys.readouterr() == ("", said if terminal else "")
