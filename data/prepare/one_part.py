"""Prepare one part of a source: its documents, tokenized, in shards and a manifest of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from data.files import holding, only_holder, read_json, write_json
from data.prepare.duplicates import without_duplicates
from data.prepare.encode import Encoder
from data.prepare.parts import Part, Report
from data.shards import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    RECORDS,
    UNSAID_AT_FIRST,
    Manifest,
    ShardWriter,
    finished_shards,
    read_model,
    remove_leftovers,
    token_dtype,
)
from data.sources import Document
from settings import counted

BATCH_BYTES = 1 << 19
"""Text handed to a tokenizing process at once, or token ids to the writer."""


class Output(NamedTuple):
    """What the shards of all parts have in common."""

    tokenizer_folder: str
    vocab_size: int
    eos_id: int
    shard_tokens: int
    deduplicate: bool
    """Documents that :mod:`data.prepare.duplicates` has found are left out."""


def prepare_part(part: Part, workers: int, report: Report, output: Output) -> Manifest:
    """Prepare ``part`` from where it was left; a complete one is only checked against its files.

    Args:
        part: what to prepare.
        workers: processes that tokenize; with 1, this one.
        report: called with the number of tokens of each batch.
        output: how the shards are written.

    Raises:
        ValueError: the part was begun with other files or settings, another command is preparing it, a file cannot be
            read, or a source of one part has no document with text.
    """
    folder, made_from = part.folder, part.made_from()
    if (folder / MANIFEST_NAME).exists():
        with holding(folder / "lock"):  # removes the lock file of a process killed just after the end
            return _complete(folder, made_from)
    folder.mkdir(parents=True, exist_ok=True)
    with only_holder(folder / "lock", f"{folder} is being prepared by another command"):
        if (folder / MANIFEST_NAME).exists():  # its last holder has just finished it
            return _complete(folder, made_from)
        if (before := begun_with(folder)) is not None:
            require_unchanged(folder, before, made_from)
        else:
            remove_leftovers(folder)  # shards without a record of their origin: they may be of other text
            write_json(folder / PROGRESS_NAME, made_from)
        writer = ShardWriter(folder, token_dtype(output.vocab_size), output.shard_tokens, finished_shards(folder))
        if writer.shards:
            print(f"{folder}: going on after {len(writer.shards)} finished shards", flush=True)
        documents = part.source.documents(writer.cursor or part.start, part.end)
        if output.deduplicate:
            documents = without_duplicates(part, made_from, documents)
        try:
            with Encoder(output.tokenizer_folder, workers) as encoder:
                for batch, (tokens, lengths) in encoder.encode(_batches(documents)):
                    writer.add(batch, tokens, lengths)
                    report(len(tokens), f"reading {part.source.label(batch[-1].after)}")
            return writer.finish(output.vocab_size, output.eos_id, made_from, may_be_empty=part.of > 1)
        finally:
            writer.abandon()


def begun_with(folder: Path) -> dict[str, Any] | None:
    """What a part's finished shards were made from; None if it has none, or nothing records it."""
    if (folder / MANIFEST_NAME).exists():
        return read_model(folder / MANIFEST_NAME, Manifest).origin
    if any(folder.glob(RECORDS)) and (folder / PROGRESS_NAME).exists():
        return read_json(folder / PROGRESS_NAME)
    return None


def _complete(folder: Path, made_from: dict[str, Any]) -> Manifest:
    manifest = read_model(folder / MANIFEST_NAME, Manifest)
    require_unchanged(folder, manifest.origin, made_from)
    remove_leftovers(folder)
    return manifest


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size_bytes = 0
    for document in documents:
        batch.append(document)
        # A document without text costs something too; many of them in a row must not pile up.
        size_bytes += document.size_bytes + 100
        if size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def require_unchanged(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to mix shards of different origins in one folder.

    Raises:
        ValueError: naming what differs between what ``folder`` was made from and what it would be made from now.
    """
    before = {key: now[key] for key in UNSAID_AT_FIRST if key in now} | before
    if "vocabulary" in before and "vocabulary" in now:
        before["vocabulary"] = now["vocabulary"] | before["vocabulary"]
    changes = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "files" and old and new:
            changes.append(changed_files(old, new))
        elif key == "tokenizer_sha256":
            changes.append("the tokenizer")
        else:
            changes.append(f"{key} ({old} -> {new})")
    if not changes:
        return
    raise ValueError(
        f"{folder} was prepared from something else; changed since: {', '.join(changes)}. Undo the change, "
        f"choose another data.dir, or remove {folder} to prepare it again"
    )


def changed_files(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str:
    """``2 source files (first: a.md: 67,396 -> 67,417 bytes)``; empty if none has changed.

    Args:
        before, now: name and size of each file, or its :func:`data.discovery.fingerprint`.
    """
    changes = [_change(old, new) for old, new in zip_longest(before, now) if old != new]
    first = "first: " if len(changes) > 1 else ""
    return f"{counted(len(changes), 'source file')} ({first}{changes[0]})" if changes else ""


def _change(old: Any, new: Any) -> str:
    if old is None:
        return f"{new['name']} is new"
    if new is None:
        return f"{old['name']} is gone"
    if old["name"] != new["name"]:
        return f"{old['name']} -> {new['name']}"
    if old["bytes"] != new["bytes"]:
        return f"{new['name']}: {old['bytes']:,} -> {new['bytes']:,} bytes"
    return f"{new['name']}: other content of the same size"
