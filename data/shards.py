"""The shard format, and its writer. ``docs/data.md`` draws the folder.

A shard is two flat little-endian files: ``shard-00000.bin``, token ids (uint16 or uint32), and ``shard-00000.ends``,
for each document the number of the shard's tokens up to and including its EOS (uint64). A finished shard gets a record,
``shard-00000.json``, from which an interrupted preparation resumes; a finished source gets ``manifest.json``, which
absorbs the records. Nothing in these files depends on time, machine or number of workers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from data.files import TEMPORARY, publish, read_json, temporary_name, write_atomically, write_json
from data.sources import Cursor, Document
from settings import Strict

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = "progress.json"
UNSAID_AT_FIRST = ("formats", "vocabulary")
"""Keys that the first versions of manifests, progress and hash files lack: missing ones count as unchanged."""
RECORDS = "shard-*.json"
"""Of finished shards, while their part is unfinished."""
ENDS_DTYPE = np.dtype("<u8")
COUNTS = ("tokens", "documents", "text_bytes", "repaired_documents", "empty_documents", "duplicate_documents")
"""What a manifest sums over its shards, and the manifest of a source over its parts."""

Schema = TypeVar("Schema", bound=Strict)


class ShardFile(Strict):
    """Size and hash of one file."""

    bytes: int = Field(ge=1)
    sha256: str


class Shard(Strict):
    """One finished shard."""

    name: str
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    text_bytes: int = Field(ge=0)
    """UTF-8 bytes of its documents' text; 0 where they came as token ids."""
    repaired_documents: int = Field(ge=0)
    """Documents in which invalid Unicode was replaced by U+FFFD."""
    empty_documents: int = Field(ge=0)
    """Documents without text that were skipped before the shard's last one."""
    duplicate_documents: int = Field(0, ge=0)
    """Documents skipped likewise because an earlier one has the same text."""
    after: tuple[int, int]
    """Where to continue reading the source: number of the file, number of the document in it."""
    files: dict[str, ShardFile]
    """By file name."""


class Manifest(Strict):
    """One finished source, or one part of it. Only a part may hold no document with text."""

    format_version: int
    dtype: Literal["uint16", "uint32"]
    """Of the token files, little-endian."""
    vocab_size: int = Field(ge=1)
    """Every token id is below it."""
    eos_id: int = Field(ge=0)
    """Closes every document."""
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    """0 where the documents came as token ids."""
    repaired_documents: int = Field(ge=0)
    empty_documents: int = Field(ge=0)
    """Documents without text; they are left out."""
    duplicate_documents: int = Field(0, ge=0)
    """Documents left out because an earlier one of the source has the same text."""
    made_from: dict[str, Any]
    """Tokenizer, settings and source list: whatever must be the same for another run to give the same shards."""
    shards: list[Shard]
    """In the order of the source; for a source of several parts, they are in the parts' folders."""

    @property
    def origin(self) -> dict[str, Any]:
        """``made_from``; for the first version of manifests, with what they record of the vocabulary."""
        return {"vocabulary": {"size": self.vocab_size, "eos_id": self.eos_id}} | self.made_from

    @property
    def tokenizer_sha256(self) -> str:
        """Hash of the tokenizer the ids belong to."""
        return str(self.made_from.get("tokenizer_sha256"))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of the format that holds every id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def read_model(path: Path, schema: type[Schema]) -> Schema:
    """Read a record or manifest.

    Raises:
        ValueError: it is missing, damaged, or of another format version.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; prepare the source with: python -m data.prepare CONFIG")
    content = read_json(path)
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}; prepare again")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is damaged: {place}: {first['msg']}; restore it or prepare again") from None


def finished_shards(folder: Path) -> list[Shard]:
    """The unbroken run of finished shards at the start of ``folder``; one with a missing or truncated file ends it."""
    shards: list[Shard] = []
    while (path := folder / f"{shard_name(len(shards))}.json").is_file():
        shard = read_model(path, Shard)
        for name, file in shard.files.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != file.bytes:
                return shards
        shards.append(shard)
    return shards


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def remove_leftovers(folder: Path) -> None:
    """Delete what only an unfinished preparation needs."""
    for path in [*folder.glob(f"*{TEMPORARY}"), *folder.glob(RECORDS), folder / PROGRESS_NAME]:
        path.unlink(missing_ok=True)


class ShardWriter:
    """Writes documents one after another; a document is never split over two shards."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int, finished: list[Shard]) -> None:
        """Continue after the ``finished`` shards; a new shard begins before the document that would take the last one
        above ``shard_tokens`` tokens."""
        self.shards = finished
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._empty_since_last = self._duplicates_since_last = 0
        self._file: BinaryIO | None = None

    @property
    def cursor(self) -> Cursor | None:
        """Where to continue reading after the finished shards; None if there are none."""
        return Cursor(*self.shards[-1].after) if self.shards else None

    def add(self, documents: list[Document], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append ``documents``, whose ``tokens`` are concatenated; a length of 0 is a document without text."""
        stored = tokens.astype(self._dtype)
        end = 0
        for document, length in zip(documents, lengths.tolist(), strict=True):
            start, end = end, end + length
            if not length:
                self._duplicates_since_last += document.duplicate
                self._empty_since_last += not document.duplicate
                continue
            if self._file is not None and self._ends[-1] + length > self._shard_tokens:
                self._close()
            if self._file is None:
                self._open()
            self._append(document, stored[start:end].tobytes(), length)

    def finish(self, vocab_size: int, eos_id: int, made_from: dict[str, Any], may_be_empty: bool = False) -> Manifest:
        """Close the last shard and write the manifest.

        Raises:
            ValueError: there was no document with text, which only ``may_be_empty`` allows.
        """
        if self._file is not None:
            self._close()
        if not self.shards and not may_be_empty:
            raise ValueError(f"{self._folder}: the source has no document with text; check its files and its fields")
        totals = {key: sum(getattr(shard, key) for shard in self.shards) for key in COUNTS}
        totals["empty_documents"] += self._empty_since_last
        totals["duplicate_documents"] += self._duplicates_since_last
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=self._dtype.name,
            vocab_size=vocab_size,
            eos_id=eos_id,
            made_from=made_from,
            shards=self.shards,
            **totals,
        )
        write_json(self._folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
        remove_leftovers(self._folder)
        return manifest

    def abandon(self) -> None:
        """Leave an unfinished shard as it is; the next run starts it again."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self._name = shard_name(len(self.shards))
        self._file = temporary_name(self._folder / f"{self._name}.bin").open("wb")
        self._hash = hashlib.sha256()
        self._ends = [0]
        self._text_bytes = self._repaired = self._empty = self._duplicates = 0

    def _append(self, document: Document, stored: bytes, length: int) -> None:
        assert self._file is not None
        self._file.write(stored)
        self._hash.update(stored)
        self._ends.append(self._ends[-1] + length)
        self._text_bytes += len(document.text)
        self._repaired += document.repaired
        # Counted only once a document with text follows, so that a run resumed from here counts the same.
        self._empty += self._empty_since_last
        self._duplicates += self._duplicates_since_last
        self._empty_since_last = self._duplicates_since_last = 0
        self._after = document.after

    def _close(self) -> None:
        assert self._file is not None
        ends = np.array(self._ends[1:], ENDS_DTYPE).tobytes()
        publish(self._file, self._folder / f"{self._name}.bin")
        self._file = None
        write_atomically(self._folder / f"{self._name}.ends", ends)
        shard = Shard(
            name=self._name,
            tokens=self._ends[-1],
            documents=len(self._ends) - 1,
            text_bytes=self._text_bytes,
            repaired_documents=self._repaired,
            empty_documents=self._empty,
            duplicate_documents=self._duplicates,
            after=self._after,
            files={
                f"{self._name}.bin": ShardFile(
                    bytes=self._ends[-1] * self._dtype.itemsize, sha256=self._hash.hexdigest()
                ),
                f"{self._name}.ends": ShardFile(bytes=len(ends), sha256=hashlib.sha256(ends).hexdigest()),
            },
        )
        write_json(self._folder / f"{self._name}.json", shard.model_dump(mode="json"))
        self.shards.append(shard)
