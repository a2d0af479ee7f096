"""Where the home folder cannot be written, the Hub's libraries get a cache that ends with the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.hub_cache import ensure_hub_cache
from settings.project import ROOT


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set on the way is undone, too
        monkeypatch.delenv(name)


def test_a_home_that_can_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_hub_cache()
    assert "HF_HOME" not in os.environ and list((tmp_path / ".cache/huggingface").iterdir()) == []


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME"])
def test_one_that_cannot_gets_a_cache_for_this_command(name: str) -> None:
    program = "import os; from data.hub_cache import ensure_hub_cache; ensure_hub_cache(); print(os.environ['HF_HOME'])"
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment | {name: "/dev/null"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hopscotch-hub-" in done.stdout and not Path(done.stdout.strip()).exists()
    assert "is not writable (Not a directory)" in done.stderr and "set HF_HOME to keep it" in done.stderr


def test_one_that_was_given_must_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/dev/null/cache")
    with pytest.raises(
        ValueError,
        match=r"HF_HOME=/dev/null/cache, the cache of the Hub's libraries, is not writable \(Not a directory\)",
    ):
        ensure_hub_cache()
