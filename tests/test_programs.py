"""A test that lacks a program says what installs it, and CI does not fail where it cannot be installed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).resolve().parent.parent


def test_the_reason_of_a_skip_is_a_line_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setattr(programs, "SEARCH", str(tmp_path))
    assert programs.reason(["sbatch"]) is None and not programs.needs("sbatch").args[0]
    told = programs.reason(["sbatch", "munged", "ssh", "ssh-keygen"])
    assert told == "needs munged, ssh, ssh-keygen: apt-get install munge openssh-client"
    mark = programs.needs("sshd")
    assert mark.args[0] and mark.kwargs["reason"] == "needs sshd: apt-get install openssh-server"


def test_every_program_of_a_cluster_has_a_package() -> None:
    for name in (*programs.SLURM, *programs.HOSTS):
        assert programs._packages([name]), name


def test_ci_goes_on_where_nothing_can_be_installed(tmp_path: Path) -> None:
    """Without root or Debian, or without a package registry: one sentence, and status 0."""
    for name, script in {"apt-get": "exit 100", "python": "echo no-such-package"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    done = subprocess.run([ROOT / ".ci/programs"], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("; tests that need them are skipped (apt-get install no-such-package)\n")
