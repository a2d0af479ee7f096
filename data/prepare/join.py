"""Join the manifests of a source's parts into the one that training reads; whoever finishes the last part does it.

Two that finish together both join, to the same bytes, each in a temporary file of its own; so it needs no lock, and may
be killed at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.files import write_json
from data.prepare.duplicates import remove_hashes
from data.prepare.one_part import require_unchanged
from data.prepare.parts import Part
from data.shards import COUNTS, MANIFEST_NAME, Manifest, Shard, read_model, remove_leftovers


def outline(part: Part) -> dict[str, Any]:
    """What all parts of ``part``'s source agree on, and any task can find out without opening a file."""
    made_from = {**part.common, **part.source.outline()}
    return made_from if part.of == 1 else {**made_from, "parts": part.of}


def outline_of(made_from: dict[str, Any]) -> dict[str, Any]:
    """The same, from what a source's manifest or progress file records."""
    if "files" not in made_from or "hub" in made_from:
        return made_from
    return {**made_from, "files": [{"name": file["name"], "bytes": file["bytes"]} for file in made_from["files"]]}


def missing(parts: Sequence[Part]) -> list[int]:
    """Numbers of the parts of a source that are not complete."""
    return [part.number for part in parts if not (part.folder / MANIFEST_NAME).exists()]


def join(parts: Sequence[Part]) -> Manifest:
    """The manifest of a source whose ``parts`` are all complete, written unless it is there.

    Raises:
        ValueError: a part's files or settings have changed, or there is no document with text.
    """
    first = parts[0]
    path = first.source_folder / MANIFEST_NAME
    if path.exists():
        _clean(first.source_folder)
        return read_model(path, Manifest)
    shards: list[Shard] = []
    counts = dict.fromkeys(COUNTS, 0)
    for part in parts:
        manifest = read_model(part.folder / MANIFEST_NAME, Manifest)
        require_unchanged(part.folder, manifest.origin, part.made_from())
        counts = {key: count + getattr(manifest, key) for key, count in counts.items()}
        shards += [_placed(shard, part.folder.name) for shard in manifest.shards]
    if not shards:
        raise ValueError(f"{first.source_folder}: no part has a document with text; check its files and its fields")
    made_from = {**first.common, **first.source.identity(), "parts": first.of}
    joined = Manifest.model_validate(manifest.model_dump() | counts | {"shards": shards, "made_from": made_from})
    try:
        write_json(path, joined.model_dump(mode="json"), shared=True)
    except FileNotFoundError:  # another process that joined them removed our unfinished file as a leftover
        if not path.exists():
            raise
    _clean(first.source_folder)
    return joined


def _clean(folder: Path) -> None:
    remove_leftovers(folder)
    remove_hashes(folder)


def _placed(shard: Shard, folder: str) -> Shard:
    """``shard`` with its files named as seen from the source's folder."""
    files = {f"{folder}/{name}": file for name, file in shard.files.items()}
    return shard.model_copy(update={"name": f"{folder}/{shard.name}", "files": files})
