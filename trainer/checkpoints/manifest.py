"""What makes a checkpoint whole: a manifest with the size and SHA-256 of every file, written last.

Reading is collective: the files are divided among the ranks, and all ranks get the same answer. Only rank 0 reads the
manifest itself, because on a shared file system others may see it late.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import read_json, sha256_of, write_json
from trainer.checkpoints.layout import newest_first, unfinished

if TYPE_CHECKING:
    from trainer.distributed import World

FORMAT = 1
NAME = "manifest.json"


def write(folder: Path, facts: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Write the manifest of ``folder``; not collective.

    Args:
        folder: everything else in it is already on the disk.
        facts: further entries.
        files: :func:`entry_of` each file, by its name below ``folder``; computed here unless given.
    """
    if files is None:
        names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        files = {name: entry_of(folder / name) for name in names}
    write_json(folder / NAME, {"format": FORMAT, **facts, "files": dict(sorted(files.items()))})


def entry_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def read(folder: Path, world: World) -> dict[str, Any]:
    """The manifest of ``folder``, read by rank 0.

    Raises:
        ValueError: if it cannot be read or has another format; on every rank.
    """
    manifest, problem = world.broadcast_object(_read(folder) if world.is_main else None)
    if problem:
        raise ValueError(problem)
    return manifest


def problem_of(folder: Path, world: World) -> str | None:
    """Why the files below ``folder`` cannot be trusted, or None if each has its size and SHA-256."""
    try:
        files = read(folder, world)["files"]
    except ValueError as error:
        return str(error)
    own = None
    for name in sorted(files)[world.rank :: world.size]:
        own = _file_problem(folder, name, files[name])
        if own:
            break
    return next((problem for problem in world.all_gather_objects(own) if problem), None)


def newest_whole(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in ``folder`` or None, and a sentence for each torn one skipped; collective.

    Every file's size and SHA-256 are compared with the manifest; the files are divided among the ranks.
    """
    found, torn = newest_whole_ones(folder, world, 1)
    return (found[0] if found else None), torn


def newest_whole_ones(folder: Path, world: World, most: int) -> tuple[list[Path], list[str]]:
    """As :func:`newest_whole`: up to ``most`` of them, the newest first."""
    torn = [f"{p.name} was never finished" for p in unfinished(folder)] if world.is_main else []
    candidates = world.broadcast_object(newest_first(folder) if world.is_main else None)
    torn = world.broadcast_object(torn)
    found: list[Path] = []
    for candidate in candidates:
        problem = problem_of(candidate, world)
        if problem is not None:
            torn.append(f"{candidate.name} is torn: {problem}")
            continue
        found.append(candidate)
        if len(found) == most:
            break
    return found, torn


def report_torn(sentences: Sequence[str], world: World) -> None:
    """Report on stderr, once for all ranks, what was skipped."""
    for sentence in sentences if world.is_main else ():
        print(f"skipped: {sentence}", file=sys.stderr, flush=True)


def _read(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    try:
        manifest = read_json(folder / NAME)
        known = manifest["format"] == FORMAT and isinstance(manifest["files"], dict)
    except FileNotFoundError:
        return None, f"it has no {NAME}"
    except (OSError, ValueError, KeyError) as error:
        return None, f"its {NAME} cannot be read ({error})"
    if not known:
        return None, f"its format is {manifest['format']}, but this version reads {FORMAT}"
    return manifest, None


def _file_problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        return None if sha256_of(path) == entry["sha256"] else f"the contents of {name} do not match its SHA-256"
    except OSError as error:  # of the disk
        return f"{name} cannot be read ({error.strerror or error})"
