"""Which files names and patterns mean, by the contract at the top of data/discovery.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.discovery import find_files, fingerprint


def names(*patterns: object) -> list[str]:
    return [path.name for path in find_files([str(pattern) for pattern in patterns])]


def test_order_links_doubles_and_hidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", ".hidden.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "z.txt").symlink_to(tmp_path / "a.txt")
    os.link(tmp_path / "b.txt", tmp_path / "hard.txt")
    (tmp_path / "folder.txt").mkdir()
    assert names(tmp_path / "*.txt") == ["a.txt", "b.txt", "empty.txt"]
    assert names(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "empty.txt", "c.txt"]
    assert names(tmp_path / ".*.txt") == [".hidden.txt"]
    monkeypatch.chdir(tmp_path)
    assert names(tmp_path / "b.txt", "b.txt", "sub/../b.txt", "*.txt", tmp_path / "z.txt") == [
        "a.txt",
        "b.txt",
        "empty.txt",
    ]
    assert names("z.txt") == ["z.txt"]


def test_home_variables_spaces_and_names_that_look_like_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", str(tmp_path / "my corpus"))
    (tmp_path / "my corpus").mkdir()
    (tmp_path / "my corpus/a[1].txt").write_text("x")
    assert names("~/my corpus/*.txt") == names("$CORPUS/a[1].txt") == names("${CORPUS}/*") == ["a[1].txt"]
    monkeypatch.delenv("CORPUS")
    with pytest.raises(ValueError, match=r"\$CORPUS/a: the environment variable \$CORPUS is not set"):
        names("$CORPUS/a")


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(raw, "wb") as file:
        file.write(b"x")
    (found,) = find_files([str(tmp_path / "*.txt")])
    assert fingerprint(found)["name"] == "caf\\xe9.txt" and fingerprint(found, tmp_path)["name"] == "caf\\xe9.txt"


def test_what_was_asked_for_is_not_left_out_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"broken\.txt is a link to .*gone, which does not exist"):
        names(tmp_path / "*.txt")
    (tmp_path / "broken.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is not a regular file"):
        names(tmp_path / "*.txt")
    with pytest.raises(ValueError, match=r"is a folder; name its files, such as"):
        names(tmp_path)
    with pytest.raises(ValueError, match=r"no file matches '.*nothing\*'"):
        names(tmp_path / "nothing*")


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(os, "access", lambda name, mode: False)  # root may read everything
    with pytest.raises(ValueError, match=r"a\.txt is not readable by this user"):
        names(tmp_path / "a.txt")
