"""Finding the files that a user names: one contract for every command that takes file names or patterns.

a name           is taken as it is, even with * or [ in it; it must be a file that can be read
a pattern        glob's: * within a folder, ** over folders; hidden files only where the dot is written
~ $NAME          the home folder, the environment's variables
{stdlib} {texts} see data/placeholders.py
order            sorted by absolute name, whatever the order and spelling of the patterns
URLs             s3://bucket/*.jsonl and others that fsspec reaches: patterns and names alike, read in place
links            followed; one real file counts once, whatever the names that lead to it
folders          matched by a pattern are skipped; named, they are refused
broken links     are refused, as is what cannot be read: nothing that was asked for is silently left out
empty files      count, and hold no document
vanished later   refused by name when they are read
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.placeholders import expand, hint
from data.remote_file import RemoteFile, find_remote
from data.urls import is_url
from settings import shown

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
COMPRESSIONS = (".gz", ".xz", ".zst")
EDGE_BYTES = 65_536
"""How much of a file's start and end goes into its fingerprint."""


def find_files(patterns: Sequence[str], as_given: bool = False) -> list[Path]:
    """The files that ``patterns`` name, by the rules above.

    Args:
        patterns: names and patterns.
        as_given: in the order of the patterns, each pattern's files sorted; else all files are sorted together.

    Raises:
        ValueError: a pattern matches no file, or matches something that cannot be read.
    """
    names = [name for pattern in patterns for name in sorted(_matches(pattern), key=_place)]
    found: dict[tuple[int, int], Path] = {}
    for name in names if as_given else sorted(names, key=_place):
        path = RemoteFile(name) if is_url(name) else Path(name)
        status = path.stat()
        found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def _place(name: str) -> str:
    return name if is_url(name) else os.path.abspath(name)


def _matches(pattern: str) -> list[str]:
    name = expand(pattern).removeprefix("file://")
    if is_url(name):
        if matched := find_remote(name):
            return matched
        raise ValueError(f"no file matches '{name}'; correct the name or pattern")
    if os.path.lexists(name):
        if Path(name).is_dir():
            raise ValueError(f"{shown(name)} is a folder; name its files, such as '{shown(name)}/**/*.jsonl'")
        matched = [name]
    else:
        matched = [match for match in glob.glob(name, recursive=True) if not os.path.isdir(match)]
    if not matched:
        raise ValueError(f"no file matches '{shown(pattern)}'{hint(pattern)}; correct the name or pattern")
    for match in matched:
        _require_readable(match)
    return matched


def _require_readable(name: str) -> None:
    if not os.path.exists(name):
        raise ValueError(
            f"{shown(name)} is a link to {shown(os.readlink(name))}, which does not exist; restore it, or remove the "
            "link"
        )
    if not os.path.isfile(name):
        raise ValueError(f"{shown(name)} is not a regular file, so it cannot be read twice; copy its contents into one")
    if not os.access(name, os.R_OK):
        raise ValueError(f"{shown(name)} is not readable by this user; change its mode, or leave it out")


def format_of(path: Path) -> str | None:
    """A file's format by its name, ignoring a compression suffix; None for an unknown suffix."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return FORMATS.get(suffix.lower())


def fingerprint(path: Path, root: Path | None = None) -> dict[str, Any]:
    """A file's name, size and a SHA-256 of its first and last 64 KiB: cheap, and unlike a date it survives a copy.

    Args:
        path: of the file.
        root: where given, the name is relative to it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(size - EDGE_BYTES, 0))
        digest.update(file.read(EDGE_BYTES))
    name = path.name if root is None else path.relative_to(root)
    return {"name": shown(name), "bytes": size, "edges_sha256": digest.hexdigest()}
