"""Prepare a config's sources, or the share of one task, and join what is complete."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from data.config import DataConfig, SourceConfig
from data.discovery import find_files, fingerprint
from data.files import only_writer, read_json, write_json
from data.prepare.duplicates import find_duplicates, hash_part, remove_hashes
from data.prepare.join import join, missing, outline, outline_of
from data.prepare.one_part import Output, begun_with, changed_files, prepare_part, require_unchanged
from data.prepare.parts import Part, cut, share
from data.prepare.processes import work_through
from data.prepare.tasks import ONLY_TASK, Task
from data.shards import FORMAT_VERSION, MANIFEST_NAME, PROGRESS_NAME, RECORDS, Manifest, read_model
from data.sources import Source, formats_of
from data.store import TokenStore, settings_of, train_folder, validation_folder
from data.token_files import Vocabulary
from data.tokenization import SentencePiece, TextTokenizer, load_text_tokenizer, tokenizer_sha256
from data.tokenizer import is_ours, require_configured
from data.tokenizer_json import require_same_ids
from data.urls import is_url
from settings import counted, shown


def prepare(config: DataConfig, workers: int, task: Task = ONLY_TASK) -> list[tuple[str, Manifest]]:
    """Prepare the parts of ``config`` that are ``task``'s; returns the manifest of each set that is then complete.

    Raises:
        ValueError: no tokenizer, or one whose ids transformers would not give; an empty or unreadable source, sources
            changed since an earlier preparation, or another command working on the same part.
    """
    tokenizer = tokenizer_of(config)  # before the processes start, so that its absence is reported once
    made: list[tuple[str, Manifest]] = []
    with only_writer(Path(config.dir), shared=True):
        sets = parts_of(config, tokenizer)
        for parts in sets:
            _require_same_origin(parts)
        mine = share([part for parts in sets for part in parts], task.number, task.of)
        if task.of > 1:
            print(f"task {task.number} of {task.of} by {task.said_by}: {counted(len(mine), 'part')}", flush=True)
        if config.deduplicate == "exact":
            _find_duplicates(sets, mine, workers)
        exact = config.deduplicate == "exact"
        output = Output(config.dir, tokenizer.vocab_size, tokenizer.eos_id, config.shard_tokens, exact)
        work_through(mine, partial(prepare_part, output=output), workers, "tokens", divisible=True)
        for parts in sets:
            folder = parts[0].source_folder
            if left := missing(parts):
                numbers = ", ".join(map(str, left[:10])) + (", ..." if len(left) > 10 else "")
                print(
                    f"{folder}: {counted(len(left), 'part')} of {len(parts)} not prepared yet ({numbers}); the task "
                    "that prepares the last one joins them",
                    flush=True,
                )
                continue
            made.append((str(folder.relative_to(config.dir)), join(parts)))
            TokenStore(folder)
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


def tokenizer_of(config: DataConfig) -> TextTokenizer:
    """The tokenizer in ``data.dir``.

    Raises:
        ValueError: there is none, it is not the config's, or transformers would give other ids.
    """
    tokenizer = load_text_tokenizer(config.dir)
    require_configured(config.tokenizer, tokenizer)
    if isinstance(tokenizer, SentencePiece) and not is_ours(Path(config.dir)):
        require_same_ids(tokenizer)  # else only an export would fail, after the training
    return tokenizer


def parts_of(config: DataConfig, tokenizer: TextTokenizer) -> list[list[Part]]:
    """All parts of each source and validation set.

    Raises:
        ValueError: a source cannot be found or read.
    """
    made = []
    for source, folder in _all_folders(config):
        vocabulary = Vocabulary.of(tokenizer)
        opened = Source(source, vocabulary, _begun_with(folder))
        common = {
            "format_version": FORMAT_VERSION,
            "tokenizer_sha256": tokenizer.sha256,
            "vocabulary": vocabulary._asdict(),
            "settings": {**settings_of(config, source), "shard_tokens": config.shard_tokens},
            "formats": sorted(set(formats_of(opened.files, source))),
        }
        made.append(cut(opened, folder, config.part_bytes, common))
    return made


def _begun_with(folder: Path) -> str | None:
    """The Hub's commit that ``folder`` was begun with, used by all tasks even if the dataset has changed since."""
    for name in (PROGRESS_NAME, MANIFEST_NAME):
        with suppress(FileNotFoundError):
            content = read_json(folder / name)
            revision = content.get("made_from", content).get("hub", {}).get("revision")
            return None if revision is None else str(revision)
    return None


def _find_duplicates(sets: list[list[Part]], mine: list[Part], workers: int) -> None:
    def hash_all(parts: Sequence[Part]) -> None:
        work_through(parts, hash_part, workers, "documents", divisible=False)

    for parts in sets:
        own = [part for part in mine if part.source_folder == parts[0].source_folder]
        if set(missing(parts)) & {part.number for part in own}:
            find_duplicates(parts, own, hash_all)


def _require_same_origin(parts: list[Part]) -> None:
    """Refuse, before any work, what disagrees with the source's other parts, whichever task prepares them."""
    folder, now = parts[0].source_folder, outline(parts[0])
    if (folder / MANIFEST_NAME).exists():
        manifest = read_model(folder / MANIFEST_NAME, Manifest)
        require_unchanged(folder, outline_of(manifest.origin), now)
        print(f"{folder}: complete already, {manifest.tokens:,} tokens", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        require_unchanged(folder, outline_of(read_json(folder / PROGRESS_NAME)), now)
        return
    except FileNotFoundError:
        pass
    except ValueError:  # the change may be one that an earlier error message asked for
        if not _finished_fits(parts):
            raise
    if len(parts) > 1:  # a single part writes its own
        write_json(folder / PROGRESS_NAME, now, shared=True)


def _finished_fits(parts: list[Part]) -> bool:
    """Whether all finished shards, if any, are those that ``parts`` would give now."""
    folder = parts[0].source_folder
    finished = {path.parent for name in (RECORDS, MANIFEST_NAME) for path in folder.rglob(name)}
    if not finished:
        remove_hashes(folder)
    if not finished <= {part.folder for part in parts}:
        return False
    for part in parts:
        if part.folder in finished and (before := begun_with(part.folder)) is not None:
            try:
                require_unchanged(part.folder, before, part.made_from())
            except ValueError:
                return False
    return True


def files_twice(config: DataConfig) -> list[str]:
    """A sentence for each pair of sources or validation sets that read the same files, whatever their names."""
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
        + (
            "; the validation loss then measures text that was trained on"
            if one.split("/")[0] != other.split("/")[0]
            else ""
        )
        for (one, other), paths in shared.items()
    ]


def changed_since(config: DataConfig) -> dict[Path, str]:
    """Shards' folders whose local source files are other ones now, with what :func:`changed_files` says of them.

    Only files newer than the manifest are opened. Sources on the Hub, at URLs, or without files are not compared.
    """
    found: dict[Path, str] = {}
    for source, folder in _all_folders(config):
        path = folder / MANIFEST_NAME
        before = read_model(path, Manifest).made_from.get("files") if path.exists() else None
        if not before or source.hub or any(map(is_url, source.files)):
            continue
        with suppress(ValueError):  # the files may be gone
            opened = Source(source)
            now = opened.outline()["files"]
            for old, new, file in zip(before, now, opened.files, strict=False):
                is_newer = file.stat().st_mtime_ns > path.stat().st_mtime_ns
                new["edges_sha256"] = (fingerprint(file) if is_newer else old)["edges_sha256"]
            if changes := changed_files(before, now):
                found[folder] = changes
    return found
