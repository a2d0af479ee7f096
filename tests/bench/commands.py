"""Something else in place of the commands that a benchmark starts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.common.children import Children


def in_place_of_commands(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Have ``run``, which is like ``subprocess.run``, called for each, unless a signal has come."""

    def instead(
        children: Children, command: list[str], log: Path | None = None, environment: dict[str, str] | None = None
    ) -> int:
        if children.signals:
            return 1
        with open(os.devnull if log is None else log, "wb") as file:
            return int(run(command, env=environment or {}, stdout=file, stderr=subprocess.STDOUT).returncode)

    monkeypatch.setattr(Children, "run", instead)
