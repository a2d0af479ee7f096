"""One source's documents, in an order that depends only on the source, from any point on.

Files are found by data/discovery.py and read by data/containers.py, datasets on the Hub are read by data/hub.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.config import SourceConfig, TokensConfig
from data.containers import csv_values, json_records, parquet_row_groups, parquet_values, whole_text
from data.discovery import FORMATS, find_files, fingerprint, format_of
from data.hub import HubDataset
from data.token_files import Vocabulary, closed, documents_of_file, with_indexes
from settings import one_line, shown


class Cursor(NamedTuple):
    """The next document to read: its file's number, and its own number within that file."""

    file: int
    document: int


class Document(NamedTuple):
    """One document as read."""

    text: bytes
    """UTF-8; empty for a document without text, which is counted and left out."""
    repaired: bool
    """Invalid Unicode in it was replaced."""
    after: Cursor
    """Where to continue reading after it."""
    ids: np.ndarray | None = None
    """For a source of token ids, which has no text: uint32 [N], with begin and end tokens; empty without any ids."""
    duplicate: bool = False
    """An earlier document has the same content; this one's is removed, and the document left out."""

    @property
    def content(self) -> bytes:
        """Its text or its token ids; empty for a document without any."""
        return self.text if self.ids is None else self.ids.tobytes()

    @property
    def size_bytes(self) -> int:
        """Its approximate size in memory."""
        return len(self.text) if self.ids is None else self.ids.nbytes

    def require_unicode(self, number: int) -> None:
        """Raise ValueError, with the document's ``number`` and the line, if anything in it was replaced."""
        if self.repaired:
            line = self.text.decode().partition("\ufffd")[0].count("\n") + 1
            raise ValueError(
                f"document {number} is not valid Unicode in its line {line} (bytes of another encoding, or half a "
                "surrogate pair), and replacing it would change the text; correct it, or convert the file with iconv"
            )

    def left_out(self) -> Document:
        """The same document marked as a duplicate, without its content."""
        ids = None if self.ids is None else self.ids[:0]
        return self._replace(text=b"", repaired=False, ids=ids, duplicate=True)


class Source:
    """A source's files, or its dataset on the Hub. Can be pickled; the files found stay the same."""

    def __init__(
        self,
        config: SourceConfig,
        vocabulary: Vocabulary | None = None,
        revision: str | None = None,
        files: Sequence[Path] | None = None,
    ) -> None:
        """Find the files.

        Args:
            config: where they are.
            vocabulary: what token ids are checked against; a source of text needs none.
            revision: of a dataset on the Hub, the commit to read; the newest one if None.
            files: found already, used instead of the config's.

        Raises:
            ValueError: a pattern matches no file, or a file's format cannot be inferred.
        """
        self.config = config
        self._vocabulary = vocabulary
        self._hub = HubDataset(config, revision) if config.hub else None
        try:
            self.files = [] if config.hub else list(files or find_files(config.files))
            if config.tokens is not None:
                self.files = with_indexes(self.files)
        except ValueError as error:
            raise ValueError(f"source '{config.name}': {error}") from None
        self._formats = formats_of(self.files, config)

    def identity(self, first: int = 0, end: int | None = None) -> dict[str, Any]:
        """What identifies files ``first`` up to ``end`` and their state: names, sizes and fingerprints.

        For a dataset on the Hub its commit, whatever the files.
        """
        if self._hub is not None:
            return self._hub.identity()
        return {"files": [fingerprint(path) for path in self.files[first:end]]}

    def outline(self) -> dict[str, Any]:
        """Like :meth:`identity` of all files, but only with name and size of each, so that none is opened."""
        if self._hub is not None:
            return self._hub.identity()
        return {"files": [{"name": shown(path.name), "bytes": path.stat().st_size} for path in self.files]}

    def sizes(self) -> list[int]:
        """Bytes of each file as stored."""
        return self._hub_sizes if self._hub is not None else [path.stat().st_size for path in self.files]

    def pieces(self, limit_bytes: int) -> Iterator[tuple[Cursor, int]]:
        """Where the source may be cut: the start of each piece, and its bytes as stored.

        A piece is a file, or a row group of a Parquet file above ``limit_bytes``. What is compressed as a whole
        cannot be cut.

        Raises:
            ValueError: a file cannot be read.
        """
        for number, size in enumerate(self.sizes()):
            if size <= limit_bytes or self._hub is not None or self._formats[number] != "parquet":
                yield Cursor(number, 0), size
                continue
            with self._naming(number):
                yield from (
                    (Cursor(number, row), group_bytes)
                    for row, group_bytes in parquet_row_groups(self.files[number]) or [(0, size)]
                )

    def label(self, cursor: Cursor) -> str:
        """What is being read at ``cursor``, for a progress line."""
        if not self.files:
            return str(self.config.hub)
        number = min(cursor.file, len(self.files) - 1)
        return f"{shown(self.files[number].name)} ({number + 1} of {len(self.files)})"

    def documents(self, start: Cursor, end: Cursor | None = None) -> Iterator[Document]:
        """Every document from ``start`` up to ``end`` (or all that follow), the ones without text included.

        Raises:
            ValueError: a file cannot be read, or a document has no text field; the message names the file.
        """
        last = Cursor(self._count, 0) if end is None else end
        for number in range(start.file, self._count):
            first = start.document if number == start.file else 0
            if number < last.file:
                yield from self.file_documents(number, first)
            elif number == last.file and first < last.document:
                yield from self.file_documents(number, first, last.document)

    def file_documents(self, number: int, first: int = 0, end: int | None = None) -> Iterator[Document]:
        """The documents of file ``number``, from its document ``first`` up to ``end``."""
        with self._naming(number):
            if self.config.tokens is not None:
                for index, ids in enumerate(self._ids(number, self.config.tokens, first, end), start=first):
                    yield Document(b"", False, Cursor(number, index + 1), ids)
                return
            for index, value in enumerate(self._values(number, self.config.text_field, first, end), start=first):
                text, repaired = _to_utf8(value, self.config.text_field, index)
                yield Document(text, repaired, Cursor(number, index + 1))

    def _ids(self, number: int, tokens: TokensConfig, first: int, end: int | None) -> Iterator[np.ndarray]:
        """The documents of one file of token ids, with begin and end tokens."""
        assert self._vocabulary is not None, "only preparation reads token ids, and has a vocabulary"
        if self._hub is None and self._formats[number] == "flat":
            return documents_of_file(self.files[number], tokens, self._vocabulary, first, end)
        values = enumerate(self._values(number, tokens.field, first, end), start=first)
        return (closed(value, tokens, self._vocabulary, f"document {index}") for index, value in values)

    @property
    def _count(self) -> int:
        return len(self.files) if self._hub is None else len(self._hub_sizes)

    @functools.cached_property
    def _hub_sizes(self) -> list[int]:
        assert self._hub is not None
        with self._naming(0):
            return self._hub.file_sizes()

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Add the file's name to whatever a decompressor, a parser or the Hub's client raises."""
        try:
            yield
        except Exception as error:
            place = shown(self.files[number]) if self.files else f"Hub dataset {self.config.hub}"
            raise ValueError(f"source '{self.config.name}': cannot read {place}: {one_line(error)}") from error

    def _values(self, number: int, field: str, first: int, end: int | None) -> Iterator[Any]:
        """The values of one file as stored, of any type."""
        if self._hub is not None:
            batches = self._hub.batches(number, len(self._hub_sizes), first)
            values: Iterator[Any] = (value for batch in batches for value in _field(batch, field, "the dataset"))
            return islice(values, None if end is None else end - first)
        path, kind = self.files[number], self._formats[number]
        if kind == "parquet":
            return parquet_values(path, field, first, end)
        if kind == "json":
            values = (_field(record, field, place) for place, record in json_records(path))
        elif kind == "text":
            values = iter([whole_text(path)])
        else:
            values = csv_values(path, field)
        return islice(values, first, end)


def formats_of(files: Sequence[Path], config: SourceConfig) -> list[str]:
    """What each of ``files`` is read as, by its name; none of them is opened.

    Raises:
        ValueError: a name does not tell its format.
    """
    return [config.format or _format_of(path, config) for path in files]


def _format_of(path: Path, config: SourceConfig) -> str:
    found = format_of(path)
    if config.tokens is not None:
        return found if found in ("json", "parquet") else "flat"
    if found is None:
        known = " ".join(FORMATS)
        raise ValueError(
            f"source '{config.name}': the format of {shown(path)} cannot be inferred from its name (known: {known}); "
            "set the source's format to text, json, parquet or csv"
        )
    return found


def _to_utf8(value: Any, field: str, index: int) -> tuple[bytes, bool]:
    """One text value as UTF-8, and whether anything in it had to be replaced."""
    if value is None:
        return b"", False
    if isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError:
            return value.decode(errors="replace").encode(), True
        return value, False
    if not isinstance(value, str):
        raise ValueError(f"document {index}: field '{field}' must hold text, got {type(value).__name__}")
    try:
        return value.encode(), False
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode(), True


def _field(record: Any, field: str, place: str) -> Any:
    if not isinstance(record, dict) or field not in record:
        there = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{place} has no field '{field}' (found: {there}); name the one with the text: text_field of the source "
            "(for token ids: tokens.field) in a config, --text-field on a command line"
        )
    return record[field]
