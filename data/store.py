"""A prepared source, read on demand (``data/open_files.py``). T: tokens in a window.

A shard that changes during a run would silently change what the run learns. So before each window the shard's files are
checked (size, modification time, inode: two system calls). If they differ from before, or at first use are newer than
the manifest, which is written last, or of another size than it records, their SHA-256 decides: the same bytes, as after
a copy, are accepted; others end the run with an error that names them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.config import DataConfig, SourceConfig
from data.files import read_json, sha256_of
from data.open_files import SHARED, Column
from data.shards import ENDS_DTYPE, MANIFEST_NAME, Manifest, Shard, read_model
from data.sources import formats_of
from data.tokenization import tokenizer_sha256


class _Look(NamedTuple):
    """What shows that a file may have changed, without reading it."""

    size_bytes: int
    changed_ns: int
    inode: int


def train_folder(config: DataConfig, name: str) -> Path:
    """Where the shards of source ``name`` are."""
    return Path(config.dir) / "train" / name


def validation_folder(config: DataConfig, name: str) -> Path:
    """Where the shards of validation set ``name`` are."""
    return Path(config.dir) / "validation" / name


def settings_of(config: DataConfig, source: SourceConfig) -> dict[str, Any]:
    """What decides the tokens of ``source`` besides its files: the config's part of it."""
    settings: dict[str, Any] = {"text_field": source.text_field}
    if source.tokens is not None:
        settings = {"tokens": source.tokens.model_dump()}
    return settings if config.deduplicate == "none" else {**settings, "deduplicate": config.deduplicate}


def require_configured(manifest: Manifest, folder: Path, config: DataConfig, source: SourceConfig) -> None:
    """Refuse shards that ``source`` would not give now, as far as that shows without its files, which may be gone.

    Args:
        manifest: of the shards; what it does not record counts as unchanged.
        folder: of the shards.
        config: the data block.
        source: the shards' source, one of the block's.

    Raises:
        ValueError: naming what has changed.
    """
    made_from = manifest.made_from
    if "settings" not in made_from:
        return
    before, now = dict(made_from["settings"]), settings_of(config, source)
    before.pop("shard_tokens", None)  # does not affect the tokens
    if hub := made_from.get("hub"):
        moved = source.hub and hub["revision"] is None  # a local folder, identified by its files, not its name
        name = source.hub if moved else hub["name"]
        before |= {"hub": name, "hub_config": hub["config"], "split": hub["split"]}
    if source.hub:
        now |= {"hub": source.hub, "hub_config": source.hub_config, "split": source.split}
    elif not hub and "formats" in made_from:
        before["formats"] = made_from["formats"]
        now["formats"] = sorted(set(formats_of([Path(file["name"]) for file in made_from["files"]], source)))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if keys:
        changes = ", ".join(f"{key} {before.get(key, 'none')} -> {now.get(key, 'none')}" for key in keys)
        raise ValueError(
            f"{folder} was prepared with settings that differ from the config's ({changes}); undo the change, or "
            "choose another data.dir and prepare again"
        )


def require_tokenizer_of_shards(folder: Path) -> None:
    """Refuse a tokenizer in ``folder`` other than the one that the shards beside it were made with.

    A model trained on those shards uses that one. Without shards, or without a tokenizer, nothing is refused.

    Raises:
        ValueError: the tokenizer is another, or a manifest is damaged.
    """
    try:
        here = tokenizer_sha256(folder)
    except ValueError:
        return
    for path in sorted([*folder.glob(f"train/*/{MANIFEST_NAME}"), *folder.glob(f"validation/*/{MANIFEST_NAME}")]):
        if there := read_json(path).get("made_from", {}).get("tokenizer_sha256"):
            _require_tokenizer(path, there, here)


def _require_tokenizer(manifest: Path, there: str, here: str) -> None:
    if there != here:
        raise ValueError(
            f"{manifest}: the shards were made with tokenizer {there[:12]}, but this data folder's tokenizer is "
            f"{here[:12]}; restore that tokenizer or prepare again"
        )


class TokenStore:
    """All shards of one source as one sequence of tokens. Read-only."""

    def __init__(self, folder: str | Path, tokenizer_sha256: str | None = None, check_files: bool = True) -> None:
        """Open ``folder`` and compare every file's size with the manifest.

        Args:
            folder: what ``data.prepare`` wrote.
            tokenizer_sha256: refuse shards made with another tokenizer; None takes any.
            check_files: check all files now; otherwise each is checked when it is used, and only the manifest is read.

        Raises:
            ValueError: a file is missing, truncated, damaged or of another format or tokenizer; the message names it.
        """
        self.folder = Path(folder)
        path = self.folder / MANIFEST_NAME
        self.manifest = read_model(path, Manifest)
        if tokenizer_sha256 is not None:
            _require_tokenizer(path, self.manifest.tokenizer_sha256, tokenizer_sha256)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        if check_files:
            self._check_files()
        counts = [shard.tokens for shard in self.manifest.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if self._starts[-1] != self.manifest.tokens:
            raise ValueError(
                f"{path} is damaged: it counts {self.manifest.tokens} tokens, but its shards hold {self._starts[-1]}; "
                "restore it or prepare again"
            )
        self._columns: list[tuple[Column, Column] | None] = [None] * len(counts)
        self._paths = [[str(self.folder / name) for name in shard.files] for shard in self.manifest.shards]
        self._seen: list[list[_Look]] = [[]] * len(counts)
        self._written_ns = path.stat().st_mtime_ns

    @property
    def tokens(self) -> int:
        """Tokens in all shards, including the documents' EOS."""
        return self.manifest.tokens

    def windows(self, length: int) -> int:
        """How many windows of T = ``length`` tokens there are; fewer than T tokens at the end belong to none."""
        return (self.tokens - 1) // length

    def window(self, number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Window ``number`` of T = ``length`` tokens, and the token after it.

        Returns:
            Tokens, int64 [T+1]: the store's ``number * T`` to ``number * T + T``, so the last one is also the
            first of the next window. And the document ends inside, int64 [E], ascending, in 1..T: an end e means that
            a document's last token is at e - 1.
        """
        assert 0 <= number < self.windows(length), f"window {number} of {self.windows(length)} in {self.folder}"
        first = number * length
        last = first + length + 1
        tokens = np.empty(length + 1, np.int64)
        ends: list[np.ndarray] = []
        shard = int(np.searchsorted(self._starts, first, side="right")) - 1
        while shard < len(self._columns) and self._starts[shard] < last:
            offset = int(self._starts[shard])
            shard_tokens, shard_ends = self._shard(shard)
            a, b = max(first - offset, 0), min(last - offset, len(shard_tokens))
            part = shard_tokens.part(a, b)
            if len(part) and int(part.max()) >= self.manifest.vocab_size:
                # On a GPU, an id without an embedding would crash without a useful message.
                raise ValueError(
                    f"{self._paths[shard][0]} is damaged: it holds the token id {int(part.max())}, but the vocabulary "
                    f"has {self.manifest.vocab_size}; {self._again()}"
                )
            tokens[offset + a - first : offset + b - first] = part
            # Ends strictly after the window's first position and at most T after it.
            low, high = shard_ends.place(max(first - offset + 1, 0)), shard_ends.place(first - offset + length + 1)
            ends.append(shard_ends.part(low, high).astype(np.int64) + (offset - first))
            shard += 1
        return tokens, np.concatenate(ends)

    def verify(self) -> None:
        """Compare every file with its SHA-256; reads everything.

        Raises:
            ValueError: naming the first file that differs.
        """
        for shard in self.manifest.shards:
            for name, file in shard.files.items():
                if sha256_of(self.folder / name) != file.sha256:
                    raise ValueError(
                        f"{self.folder / name} is damaged: its SHA-256 differs from {MANIFEST_NAME}; {self._again()}"
                    )

    def _check_files(self) -> None:
        for shard in self.manifest.shards:
            sizes = {
                f"{shard.name}.bin": shard.tokens * self._dtype.itemsize,
                f"{shard.name}.ends": shard.documents * ENDS_DTYPE.itemsize,
            }
            for name, size in sizes.items():
                path, again = self.folder / name, self._again()
                try:
                    there = os.stat(path).st_size
                except FileNotFoundError:
                    raise ValueError(f"{path} is missing; {again}") from None
                if there != size or name not in shard.files or shard.files[name].bytes != size:
                    raise ValueError(f"{path} has {there} bytes, but the manifest says {size}; {again}")

    def _shard(self, number: int) -> tuple[Column, Column]:
        """Token ids [N] and document ends [D] of one shard."""
        columns, shard = self._columns[number], self.manifest.shards[number]
        looks = [self._look(path) for path in self._paths[number]]
        if columns is None or looks != self._seen[number]:
            for path in self._paths[number]:
                SHARED.forget(path)
            expected = [file.bytes for file in shard.files.values()]
            whole = expected == [look.size_bytes for look in looks]
            if columns is not None or not whole or any(look.changed_ns > self._written_ns for look in looks):
                self._compare(shard)
            tokens, ends = (str(self.folder / f"{shard.name}.{kind}") for kind in ("bin", "ends"))
            columns = Column(tokens, self._dtype, shard.tokens), Column(ends, ENDS_DTYPE, shard.documents)
            self._columns[number], self._seen[number] = columns, looks
        return columns

    def _look(self, path: str) -> _Look:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is gone; {self._again()}") from None
        return _Look(status.st_size, status.st_mtime_ns, status.st_ino)

    def _compare(self, shard: Shard) -> None:
        """Refuse a shard whose bytes are not those of the manifest."""
        logging.getLogger("hopscotch").info(
            f"comparing {self.folder / shard.name} with its SHA-256, because it was modified after it was prepared or "
            f"opened; if that was an intended copy, touch {self.folder / MANIFEST_NAME} to skip this"
        )
        for name, file in shard.files.items():
            if sha256_of(self.folder / name) != file.sha256:
                raise ValueError(
                    f"{self.folder / name} was changed after it was prepared: its SHA-256 differs from "
                    f"{MANIFEST_NAME}; {self._again()}"
                )

    def _again(self) -> str:
        return f"restore it, or remove {self.folder} and prepare again"
