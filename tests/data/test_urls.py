"""Which URLs are refused before anything runs, and what is tried again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data import urls


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("runs/my", "FIELD must be a URL such as s3://bucket/folder, got 'runs/my'; correct it"),
        ("s3://", "FIELD must be a URL such as s3://bucket/folder, got 's3://'; correct it"),
        (
            "s3://bucket/run::old",
            "FIELD s3://bucket/run::old contains '::', which chains file systems in fsspec, so "
            "s3://bucket/run would be used; give one without it",
        ),
        ("s33://bucket/run", "FIELD s33://bucket/run: the protocol 's33' is not known; did you mean 's3'?"),
    ],
)
def test_what_is_no_url_is_told(url: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        urls.require_reachable(url, "FIELD")
    assert str(refused.value) == sentence


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import known_implementations, registry

    assert "gs" in known_implementations
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "gs" not in registry
    with pytest.raises(ValueError, match=r"gcsfs, which reads and writes there, is not installed; install it with: "):
        urls.require_reachable("gs://bucket/run", "FIELD")


def test_folders_are_urls_too_and_remember_nothing(tmp_path: Path) -> None:
    urls.require_reachable(f"file://{tmp_path}", "FIELD")
    system, place = urls.open_filesystem(f"file://{tmp_path}/new/")
    assert place == f"{tmp_path}/new" and urls.entries(system, place) == []
    system.pipe_file(f"{place}/a", b"1")
    assert urls.entries(system, place) == ["a"]


def test_what_cannot_change_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(urls.time, "sleep", pauses.append)

    def fails(error: Exception, times: int) -> str:
        tried.append(error)
        if len(tried) <= times:
            raise error
        return "well"

    tried: list[Exception] = []
    assert urls.with_retries(lambda: fails(ConnectionError("gone"), 3)) == "well" and pauses == [1.0, 2.0, 4.0]
    tried.clear()
    with pytest.raises(ConnectionError):
        urls.with_retries(lambda: fails(ConnectionError("gone"), 4))
    tried.clear()
    with pytest.raises(PermissionError):
        urls.with_retries(lambda: fails(PermissionError("403"), 1))
    assert len(tried) == 1


def test_reasons_are_a_line() -> None:
    assert urls.reason(OSError("one\n  two")) == "OSError: one two" and urls.reason(OSError()) == "OSError"
    assert urls.is_refusal(PermissionError()) and not urls.is_refusal(ConnectionError())


def test_a_folder_is_copied_and_one_file_of_it_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    for name in ("config.json", "weights/b.bin", "a.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    url, order, put_file = f"file://{tmp_path}/away", list[str](), LocalFileSystem.put_file

    def put(self: LocalFileSystem, path1: str, path2: str, **rest: object) -> None:
        order.append(path2.removeprefix(f"{tmp_path}/away/"))
        put_file(self, path1, path2, **rest)

    urls.require_empty(url, "--copy-to")
    monkeypatch.setattr(LocalFileSystem, "put_file", put)
    urls.copy_folder(tmp_path / "out", url, "config.json")
    assert order == ["a.txt", "weights/b.bin", "config.json"]
    assert (tmp_path / "away/weights/b.bin").read_text() == "weights/b.bin"
    with pytest.raises(ValueError) as taken:
        urls.require_empty(url, "--copy-to")
    assert str(taken.value).startswith(f"--copy-to {url} already holds ") and "give an empty place" in str(taken.value)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(LocalFileSystem, "put_file", refuse)
    with pytest.raises(
        ValueError, match=r"out is complete, but its copy at .*other is not .PermissionError: Forbidden.; grant access"
    ):
        urls.copy_folder(tmp_path / "out", f"file://{tmp_path}/other", "config.json")
    monkeypatch.setattr(LocalFileSystem, "ls", refuse)
    with pytest.raises(
        ValueError, match=r"--copy-to .*other cannot be used .PermissionError: Forbidden.; grant access"
    ):
        urls.require_empty(f"file://{tmp_path}/other", "--copy-to")
