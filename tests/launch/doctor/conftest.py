"""The doctor's command in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from launch.doctor import __main__ as doctor
from launch.doctor import storage


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit status and output of the command in this process, without ranks."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):  # of the one rank that other tests are
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "PROBE_BYTES", 2**20)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["launch.doctor", *arguments])
        try:
            status = doctor.main()
        except SystemExit as end:
            status = int(str(end.code))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call
