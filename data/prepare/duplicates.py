"""Exact duplicates of documents within a source: found by hash before anything is tokenized.

1. Every part gets a file of its documents' hashes: 16 bytes of BLAKE2b over the text (or ids) and 8 for its place,
   sorted by hash. A task hashes its own parts first, then those of tasks that are not running; it waits for parts that
   another task is hashing.
2. The first task to get there compares the files of all parts, a range of hashes at a time, and lists all documents but
   the first of every text, in the order of the source.
3. Each part leaves out its own duplicates, and counts them.

This takes 24 bytes per document on disk, in ``duplicates/`` of the source's folder, until the source is complete. In
memory are those of one part per process in the first step, and in the second ``_COMPARED_BYTES`` and 8 bytes for each
duplicate. Everything depends on the source alone, so it may be done twice, and be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import holding, write_atomically
from data.prepare.parts import Part, Report
from data.shards import UNSAID_AT_FIRST
from data.sources import Cursor, Document

_FOLDER = "duplicates"
_LEFT_OUT = "left_out.bin"
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u8")])
_DOCUMENTS_A_FILE_BITS = 40
_COMPARED_BYTES = 1 << 29
_LOOK_EVERY_S = 0.5
_REPORT_EVERY = 1000


def find_duplicates(
    parts: Sequence[Part], mine: Sequence[Part], work_through: Callable[[Sequence[Part]], None]
) -> None:
    """Store which documents of a source are left out, unless that is done.

    Args:
        parts: all of the source.
        mine: those of this task.
        work_through: calls :func:`hash_part` for parts, in any processes.

    Raises:
        ValueError: a part's files changed since they were hashed, or cannot be read.
    """
    folder = parts[0].source_folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _LEFT_OUT).exists():
        return
    work_through(_not_hashed(mine))
    while missing := _not_hashed(parts):
        if idle := [part for part in missing if not _is_held(_lock(part))]:
            work_through(idle)
        else:
            time.sleep(_LOOK_EVERY_S)
    while not (folder / _LEFT_OUT).exists():
        with holding(folder / "lock") as holder:
            if holder is None and not (folder / _LEFT_OUT).exists():
                places = _compare(_all_hashes(parts))
                write_atomically(folder / _LEFT_OUT, places.tobytes(), shared=True)
        if holder is not None:
            time.sleep(_LOOK_EVERY_S)


def hash_part(part: Part, _: int, report: Report) -> None:
    """Write the hashes of a part's documents, unless they exist or another process is writing them."""
    with holding(_lock(part)) as holder:
        if holder is not None or (path := _hashes(part, part.made_from())).exists():
            return
        records = bytearray()
        for documents, document in enumerate(part.source.documents(part.start, part.end), start=1):
            if content := document.content:
                place = _place(document.after).to_bytes(8, "little")
                records += hashlib.blake2b(content, digest_size=16).digest() + place
            if documents % _REPORT_EVERY == 0:
                report(_REPORT_EVERY, f"comparing {part.source.label(document.after)}")
        table = np.frombuffer(records, _RECORD)
        write_atomically(path, table[np.lexsort((table["low"], table["high"]))].tobytes(), shared=True)


def without_duplicates(part: Part, made_from: dict[str, Any], documents: Iterator[Document]) -> Iterator[Document]:
    """``documents`` of ``part``, with duplicates emptied and marked as left out.

    Raises:
        ValueError: the part is no longer ``made_from`` what was hashed.
    """
    if not _hashes(part, made_from).exists():
        raise ValueError(_changed(part))
    path = part.source_folder / _FOLDER / _LEFT_OUT
    places = np.fromfile(path, "<u8") if path.stat().st_size < _RECORD.itemsize else np.memmap(path, "<u8", mode="r")
    first, last = places_between(places, part.start, part.end)
    left_out = set(places[first:last].tolist())
    for document in documents:
        if _place(document.after) in left_out:
            yield document.left_out()
        else:
            yield document


def places_between(places: np.ndarray, start: Cursor, end: Cursor) -> tuple[int, int]:
    """In ascending uint64 ``places`` the index of the first after ``start``, and of the first after ``end``."""
    # As uint64, too: with int64 both would be cast to floats, which cannot hold places from file 8,192 on.
    first, last = np.searchsorted(places, np.array([_place(start) + 1, _place(end) + 1], "<u8"))
    return int(first), int(last)


def remove_hashes(source_folder: Path) -> None:
    """Delete what only an unfinished preparation needs."""
    shutil.rmtree(source_folder / _FOLDER, ignore_errors=True)


def _place(after: Cursor) -> int:
    """A document as one number, made of the cursor after it; ascending in the order of the source."""
    return after.file << _DOCUMENTS_A_FILE_BITS | after.document


def _compare(paths: Sequence[Path]) -> np.ndarray:
    """Places of all documents but the first of every text: uint64, ascending."""
    tables = [np.memmap(path, _RECORD, mode="r") for path in paths if path.stat().st_size]
    ranges = max(1, sum(table.nbytes for table in tables) // _COMPARED_BYTES + 1)
    borders = [number * 2**64 // ranges for number in range(1, ranges)]
    cuts = [[0, *np.searchsorted(table["high"], np.array(borders, "<u8")), len(table)] for table in tables]
    repeated = [np.empty(0, "<u8")]
    for number in range(ranges):
        slices = [table[cut[number] : cut[number + 1]] for table, cut in zip(tables, cuts, strict=True)]
        if not slices:
            break
        records = np.concatenate(slices)
        records = records[np.lexsort((records["place"], records["low"], records["high"]))]
        same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
        repeated.append(records["place"][1:][same])
    return np.sort(np.concatenate(repeated))


def _hashes(part: Part, made_from: dict[str, Any]) -> Path:
    """Where the hashes of a part go, if it is ``made_from`` this."""
    hashed = {key: value for key, value in made_from.items() if key not in UNSAID_AT_FIRST}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]
    return part.source_folder / _FOLDER / f"{part.number:05d}-{digest}.hashes"


def _there(parts: Sequence[Part]) -> dict[int, list[Path]]:
    """The files of hashes of a source's parts by their number: the folder is listed once for all."""
    found: dict[int, list[Path]] = {}
    for path in sorted((parts[0].source_folder / _FOLDER).glob("*.hashes")) if parts else []:
        found.setdefault(int(path.name.partition("-")[0]), []).append(path)
    return found


def _not_hashed(parts: Sequence[Part]) -> list[Part]:
    there = _there(parts)
    return [part for part in parts if part.number not in there]


def _all_hashes(parts: Sequence[Part]) -> list[Path]:
    there = _there(parts)
    for part in parts:
        if len(there.get(part.number, [])) != 1:
            raise ValueError(_changed(part))
    return [there[part.number][0] for part in parts]


def _changed(part: Part) -> str:
    return (
        f"the files of part {part.number} of {part.source_folder} changed after their documents were compared; undo "
        f"the change, or remove {part.source_folder} to prepare it again"
    )


def _lock(part: Part) -> Path:
    return part.source_folder / _FOLDER / f"{part.number:05d}.lock"


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    with holding(path) as holder:
        return holder is not None
