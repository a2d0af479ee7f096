"""Which code this is: the commit, and what tracked files have on top of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.programs import needs
from trainer import git_state

pytestmark = needs("git")
Git = Callable[..., str]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of this project's, whose state nothing remembers."""
    monkeypatch.setattr(git_state, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    _forget()
    yield tmp_path
    _forget()


@pytest.fixture
def git(root: Path) -> Git:
    """A repository there, with one file committed; runs git in it."""

    def run(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    (root / "code.py").write_text("a = 1\n")
    run("init", "--quiet")
    run("add", "code.py")
    run("commit", "--quiet", "--message", "First")
    return run


def _forget() -> None:
    git_state.commit.cache_clear()
    git_state.diff.cache_clear()


def test_as_committed(root: Path, git: Git) -> None:
    (root / "notes.txt").write_text("not tracked")
    assert git_state.commit() == git("rev-parse", "HEAD") and git_state.diff() == ""


def test_changed_since(root: Path, git: Git) -> None:
    git("config", "color.ui", "always")
    (root / "code.py").write_text("a = 2\n")
    (root / "picture.bin").write_bytes(bytes(range(256)))
    git("add", "picture.bin")
    assert git_state.commit() == git("rev-parse", "HEAD") + "-dirty"
    patch = git_state.diff()
    assert "-a = 1\n+a = 2\n" in patch
    git("reset", "--quiet", "--hard")
    (root / "code.diff").write_text(patch)
    git("apply", "code.diff")
    assert (root / "code.py").read_text() == "a = 2\n" and (root / "picture.bin").read_bytes() == bytes(range(256))
    assert git_state.diff() == patch  # read once a process


def test_outside_a_repository() -> None:
    assert git_state.commit() is None and git_state.diff() == ""


@pytest.mark.usefixtures("git")
def test_without_git(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("PATH", str(root))
    assert git_state.commit() is None and git_state.diff() == ""


def test_a_copy_brings_its_own_though_it_lies_in_a_repository(root: Path, git: Git) -> None:
    (root / git_state.COMMIT).write_text("abc-dirty\n")
    (root / git_state.CHANGES).write_text("--- a\n")
    assert (git_state.commit(), git_state.diff()) == ("abc-dirty", "--- a\n")
    _forget()
    (root / git_state.COMMIT).write_text("\n")  # it was copied from no repository
    assert git_state.commit() is None
