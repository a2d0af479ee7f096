"""Tokenize every source and validation set into shards: ``python -m data.prepare CONFIG [key.sub=value ...]``.

One process reads, ``--workers`` tokenize, and the shards are the same for any number of them. Killed at any moment,
the same command goes on after the last finished shard and ends with the same bytes as an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from data.config import DataConfig, SourceConfig
from data.discovery import find_files
from data.encode import Encoder
from data.files import only_writer, read_json, write_json
from data.progress import Progress
from data.shards import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PROGRESS_NAME,
    Manifest,
    ShardWriter,
    finished_shards,
    read_model,
    remove_leftovers,
    token_dtype,
)
from data.sources import Document, Source
from data.store import TokenStore, train_folder, validation_folder
from data.tokenization import SentencePiece, TextTokenizer, load_text_tokenizer, tokenizer_sha256
from data.tokenizer import is_ours, require_configured
from data.tokenizer_json import require_same_ids
from settings import counted, load, parse_arguments, shown, user_errors

BATCH_BYTES = 1 << 19
"""Text handed to a tokenizing process at once."""


def prepare(config: DataConfig, workers: int) -> list[tuple[str, Manifest]]:
    """Prepare everything in ``config``; returns the manifest of each source and validation set.

    Raises:
        ValueError: no tokenizer, or one that transformers would not follow; an empty or unreadable source, sources
            changed since an earlier preparation, or another preparation running in the same folder.
    """
    tokenizer = load_text_tokenizer(config.dir)  # before the processes start, so that its absence is reported once
    require_configured(config.tokenizer, tokenizer)
    if isinstance(tokenizer, SentencePiece) and not is_ours(Path(config.dir)):
        require_same_ids(tokenizer)  # an export would find out when all is trained
    made: list[tuple[str, Manifest]] = []
    with only_writer(Path(config.dir)), Encoder(config.dir, workers) as encoder:
        for source, folder in _all_folders(config):
            manifest = _prepare_source(config, source, folder, tokenizer, encoder)
            made.append((str(folder.relative_to(config.dir)), manifest))
    return made


def verify(config: DataConfig) -> list[tuple[str, Manifest]]:
    """Compare every prepared file with the SHA-256 in its manifest, and every manifest with the tokenizer.

    Raises:
        ValueError: naming the first file that differs.
    """
    expected = tokenizer_sha256(config.dir)
    made: list[tuple[str, Manifest]] = []
    for _, folder in _all_folders(config):
        store = TokenStore(folder, expected)
        store.verify()
        made.append((str(folder.relative_to(config.dir)), store.manifest))
    return made


def _all_folders(config: DataConfig) -> list[tuple[SourceConfig, Path]]:
    train = [(source, train_folder(config, source.name)) for source in config.sources]
    return train + [(source, validation_folder(config, source.name)) for source in config.validation]


def _prepare_source(
    config: DataConfig, source_config: SourceConfig, folder: Path, tokenizer: TextTokenizer, encoder: Encoder
) -> Manifest:
    source = Source(source_config)
    made_from = {
        "format_version": FORMAT_VERSION,
        "tokenizer_sha256": tokenizer.sha256,
        "settings": {"text_field": source_config.text_field, "shard_tokens": config.shard_tokens},
        **source.identity(),
    }
    if (folder / MANIFEST_NAME).exists():
        manifest = read_model(folder / MANIFEST_NAME, Manifest)
        _require_unchanged(folder, manifest.made_from, made_from)
        TokenStore(folder)
        remove_leftovers(folder)
        print(f"{folder}: complete already, {manifest.tokens:,} tokens", flush=True)
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PROGRESS_NAME).exists():
        _require_unchanged(folder, read_json(folder / PROGRESS_NAME), made_from)
    else:
        remove_leftovers(folder)  # records of nobody knows what: without their origin they prove nothing
        write_json(folder / PROGRESS_NAME, made_from)
    writer = ShardWriter(folder, token_dtype(tokenizer.vocab_size), config.shard_tokens, finished_shards(folder))
    if writer.shards:
        print(f"{folder}: going on after {len(writer.shards)} finished shards", flush=True)
    try:
        with Progress(source_config.name, writer.tokens) as progress:
            for batch, (tokens, lengths) in encoder.encode(_batches(source.documents(writer.cursor))):
                writer.add(batch, tokens, lengths)
                progress.add(len(tokens), source.label(batch[-1].after))
        return writer.finish(tokenizer.vocab_size, tokenizer.eos_id, made_from)
    finally:
        writer.abandon()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size_bytes = 0
    for document in documents:
        batch.append(document)
        # A document without text costs something too; many of them in a row must not pile up.
        size_bytes += len(document.text) + 100
        if size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _require_unchanged(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to mix shards of different origins in one folder."""
    if before == now:
        return
    changes = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "files" and old and new:
            pairs = list(zip_longest(old, new))
            first = next((a or {}, b or {}) for a, b in pairs if a != b)
            names = " -> ".join(str(file.get("name", "none")) for file in first)
            changes.append(f"{sum(a != b for a, b in pairs)} source files (first: {names})")
        elif key == "tokenizer_sha256":
            changes.append("the tokenizer")
        else:
            changes.append(f"{key} ({old} -> {new})")
    raise ValueError(
        f"{folder} was prepared from something else; changed since: {', '.join(changes)}. Undo the change, "
        f"choose another data.dir, or remove {folder} to prepare it again"
    )


def files_twice(config: DataConfig) -> list[str]:
    """A sentence for every two of the sources and validation sets that read the same files, whatever their names."""
    readers: dict[tuple[int, int], list[tuple[str, Path]]] = {}
    for source, folder in _all_folders(config):
        for path in [] if source.hub else find_files(source.files):
            status = path.stat()
            name = str(folder.relative_to(config.dir))
            readers.setdefault((status.st_dev, status.st_ino), []).append((name, path))
    shared: dict[tuple[str, str], list[Path]] = {}
    for first, *others in readers.values():
        for name, path in others:
            shared.setdefault((first[0], name), []).append(path)
    return [
        f"{one} and {other} share {counted(len(paths), 'file')}, such as {shown(paths[0])}"
        + ("; that validation loss says nothing of other text" if one.split("/")[0] != other.split("/")[0] else "")
        for (one, other), paths in shared.items()
    ]


def _report(made: list[tuple[str, Manifest]], sequence_tokens: int) -> str:
    lines = []
    for name, manifest in made:
        lines.append(
            f"{name}: {manifest.tokens:,} tokens, {manifest.documents:,} documents, {manifest.text_bytes:,} bytes of "
            f"text ({manifest.text_bytes / manifest.tokens:.2f} bytes/token), "
            f"{counted(len(manifest.shards), 'shard')}, "
            f"{(manifest.tokens - 1) // sequence_tokens:,} windows of {sequence_tokens:,} tokens"
        )
        if manifest.empty_documents:
            lines.append(f"{name}: left out {manifest.empty_documents:,} documents without text")
        if manifest.repaired_documents:
            lines.append(f"{name}: replaced invalid Unicode by U+FFFD in {manifest.repaired_documents:,} documents")
    return "\n".join(lines)


def _cores() -> int:
    """Cores this process may use: in a cluster job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare",
        description="Tokenize data.sources and data.validation into shards of at most data.shard_tokens tokens under "
        "data.dir. May be killed and started again: finished shards are kept.",
    )
    parser.add_argument("config", help="YAML file; only its data block is read")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for example data.shard_tokens=50000000")
    parser.add_argument(
        "--workers",
        type=int,
        default=_cores(),
        help="tokenizing processes (default: all cores, %(default)s)",
    )
    parser.add_argument("--verify", action="store_true", help="write nothing; check the SHA-256 of every prepared file")
    arguments = parse_arguments(parser)
    with user_errors():
        config = load(arguments.config, arguments.overrides, DataConfig, block="data")
        if arguments.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {arguments.workers}")
        made = verify(config) if arguments.verify else prepare(config, arguments.workers)
        print(_report(made, config.sequence_tokens))
        if arguments.verify:
            print("verified: every file has the size and SHA-256 of its manifest")
            return
        for sentence in files_twice(config):
            print(f"warning: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
