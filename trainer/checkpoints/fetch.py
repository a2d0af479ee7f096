"""Fetching the newest whole checkpoint from a run's bucket, if the run folder has none.

The ranks divide the files among themselves, biggest first, and synchronise after each: so no rank waits longer for the
others than one file takes, and all learn of a failure at once. Every file's size and SHA-256 are compared with the
manifest once it is copied; the folder is renamed last, as when a checkpoint is saved. An error of the run's own disk is
reported as one of the run folder, not of the mirror.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from data import urls
from settings.user_errors import NOT_WRITABLE
from trainer.checkpoints import manifest
from trainer.checkpoints.bucket import Bucket, facts_of, unreachable
from trainer.checkpoints.layout import partial_of
from trainer.checkpoints.ownership import write_starts
from trainer.checkpoints.receipts import appears
from trainer.checkpoints.retention import check_room, remove, unwritable
from trainer.distributed import World


def mirrored_names(url: str, world: World) -> list[str]:
    """Names of the checkpoints at ``url`` that have a manifest, newest first; collective.

    Raises:
        ValueError: if it cannot be reached.
    """
    names, problem = [], None
    if world.is_main:
        try:
            names = urls.with_retries(lambda: Bucket(url).whole())
        except Exception as error:  # each service has its own exception classes
            problem = unreachable(url, error)
    names, problem = world.broadcast_object((names, problem))
    if problem:
        raise ValueError(f"{problem}, so it is not known whether there is a checkpoint to resume from")
    return list(names)


def fetch(url: str, name: str, folder: Path, metrics: Path, world: World) -> str | None:
    """Copy checkpoint ``name`` from ``url`` into ``folder``; return why it is not whole there, or None; collective.

    Also copies the run's file of ``metrics``, if there is none here, and the ids of the starts, by which the mirror is
    this run's.

    Raises:
        ValueError: if the mirror cannot be reached, or the run folder cannot be written.
    """
    final = folder / name
    files, content, torn = _begin(url, final, world)
    order = sorted(files, key=lambda file: (-files[file]["bytes"], file))
    for some in [order[at : at + world.size] for at in range(0, len(order), world.size)]:
        if torn:
            break
        mine = some[world.rank :][:1]
        torn = _agreed(_copied(url, final, mine[0], files[mine[0]]) if mine else _WELL, world)
    outcome = _finished(url, final, content, metrics) if world.is_main and torn is None else _WELL
    return _agreed(outcome, world) or torn


class _Outcome(NamedTuple):
    """Why a checkpoint is not whole in the mirror, or why that is not known."""

    torn: str | None = None
    problem: str | None = None


_WELL = _Outcome()


def _begin(url: str, final: Path, world: World) -> tuple[dict[str, Any], bytes, str | None]:
    """The checkpoint's file entries and manifest, after creating an empty folder for it; or why it is not whole."""
    files, content, outcome = {}, b"", _WELL
    if world.is_main:
        try:
            content = urls.with_retries(lambda: Bucket(url).manifest_bytes(final.name)) or b""
            files = facts_of(content)["files"]
            _make_room(files, final)
        except ValueError as error:
            outcome = _Outcome(None, str(error)) if files else _Outcome(str(error))
        except Exception as error:  # each service has its own exception classes
            outcome = _Outcome(None, unreachable(url, error))
    files, content, outcome = world.broadcast_object((files, content, outcome))
    if outcome == _WELL and not appears(partial_of(final)):
        outcome = _Outcome(None, f"rank {world.rank} does not see {partial_of(final)}, which rank 0 has created")
    return files, content, _agreed(outcome, world)


def _make_room(files: dict[str, Any], final: Path) -> None:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial_of(final), ignore_errors=True)
        check_room(sum(entry["bytes"] for entry in files.values()), final.parent, final.name, None)
        for file in files:
            (partial_of(final) / file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(unwritable(final.parent.parent, error)) from error


def _copied(url: str, final: Path, file: str, entry: dict[str, Any]) -> _Outcome:
    """Copy one file; once more if it does not match the manifest."""
    target = partial_of(final) / file
    for _ in range(2):
        try:
            urls.with_retries(lambda: Bucket(url).get(final.name, file, target))
        except FileNotFoundError:
            return _Outcome(f"{file} is missing")
        except Exception as error:  # each service has its own exception classes
            return _Outcome(None, _blamed(url, final.parent.parent, error))
        try:
            with target.open("rb") as written:
                os.fsync(written.fileno())
            if manifest.entry_of(target) == entry:
                return _WELL
        except OSError as error:
            return _Outcome(None, unwritable(final.parent.parent, error))
    return _Outcome(f"{file} does not have the size and SHA-256 of its manifest")


def _finished(url: str, final: Path, content: bytes, metrics: Path) -> _Outcome:
    """Copy the metrics, write the manifest, and give the folder its name."""
    try:
        urls.with_retries(lambda: Bucket(url).get_beside(metrics))
        starts = urls.with_retries(lambda: Bucket(url).starts())
    except Exception as error:  # each service has its own exception classes
        return _Outcome(None, _blamed(url, final.parent.parent, error))
    try:
        (partial_of(final) / manifest.NAME).write_bytes(content)
        write_starts(final.parent.parent, starts)
        if final.exists():  # a torn one
            remove(final)
        partial_of(final).rename(final)
    except OSError as error:
        return _Outcome(None, unwritable(final.parent.parent, error))
    return _WELL


def _blamed(url: str, run: Path, error: Exception) -> str:
    """The error for a file that could not be copied: that of the disk of ``run``, or that of the mirror."""
    if isinstance(error, OSError):
        names = [os.path.abspath(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
        if error.errno in NOT_WRITABLE or any(Path(name).is_relative_to(run.absolute()) for name in names):
            return unwritable(run, error)
    return unreachable(url, error)


def _agreed(own: _Outcome, world: World) -> str | None:
    """Why the checkpoint is torn, as found by any rank; None if it is not.

    Raises:
        ValueError: if that is not known.
    """
    all_of_them = world.all_gather_objects(own)
    if problem := next((outcome.problem for outcome in all_of_them if outcome.problem), None):
        raise ValueError(problem)
    return next((outcome.torn for outcome in all_of_them if outcome.torn), None)
