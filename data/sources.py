"""One source's documents, in an order that depends on nothing but the source, from any point on.

Which files it has says data/discovery.py, what they come in data/containers.py. Datasets on the Hub go through the
``datasets`` library, streaming.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data.config import SourceConfig
from data.containers import csv_values, json_records, parquet_values, whole_text
from data.discovery import FORMATS, find_files, fingerprint, format_of
from data.hub_cache import ensure_hub_cache
from settings import shown

ROWS_AT_ONCE = 64


class Cursor(NamedTuple):
    """The next document to read: its file's number, and its own number within that file."""

    file: int
    document: int


class Document(NamedTuple):
    """One document as read."""

    text: bytes
    """UTF-8; empty for a document without text, which is counted and left out."""
    repaired: bool
    """Something in it was no valid Unicode and was replaced."""
    after: Cursor
    """Where reading goes on after it."""


class Source:
    """A source's files, or its dataset on the Hub."""

    def __init__(self, config: SourceConfig) -> None:
        """Find the files.

        Raises:
            ValueError: a pattern matches no file, or a file's format cannot be inferred.
        """
        self.config = config
        self._revision = _hub_revision(config) if config.hub else None
        try:
            self.files = [] if config.hub else find_files(config.files)
        except ValueError as error:
            raise ValueError(f"source '{config.name}': {error}") from None
        self._formats = [config.format or _format_of(path, config.name) for path in self.files]

    def identity(self) -> dict[str, Any]:
        """What identifies this source and its state: its files' names, sizes and fingerprints, or the Hub revision."""
        if self.config.hub:
            hub = {"name": self.config.hub, "config": self.config.hub_config, "split": self.config.split}
            folder = Path(self.config.hub)
            files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
            there = {"files": [fingerprint(path, folder) for path in files]} if files else {}
            return {"hub": {**hub, "revision": self._revision}, **there}
        return {"files": [fingerprint(path) for path in self.files]}

    def label(self, cursor: Cursor) -> str:
        """What is being read at ``cursor``, for a progress line."""
        if not self.files:
            return str(self.config.hub)
        number = min(cursor.file, len(self.files) - 1)
        return f"{shown(self.files[number].name)} ({number + 1} of {len(self.files)})"

    def documents(self, start: Cursor) -> Iterator[Document]:
        """Every document from ``start`` on, the ones without text included.

        Raises:
            ValueError: a file cannot be read, or a document has no text field; the sentence names the file.
        """
        for number in range(start.file, max(len(self.files), 1)):
            yield from self.file_documents(number, start.document if number == start.file else 0)

    def file_documents(self, number: int, first: int = 0) -> Iterator[Document]:
        """The documents of file ``number`` (0 for the Hub), from its document ``first`` on."""
        place = shown(self.files[number]) if self.files else f"Hub dataset {self.config.hub}"
        try:
            for index, value in enumerate(self._values(number, first), start=first):
                text, repaired = _to_utf8(value, self.config.text_field, index)
                yield Document(text, repaired, Cursor(number, index + 1))
        except Exception as error:
            # Whatever a decompressor, a parser or the Hub's client raises over a file, its user needs the file's name.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"source '{self.config.name}': cannot read {place}: {reason}") from error

    def _values(self, number: int, first: int) -> Iterator[Any]:
        """The text values of one file as they stand there, of whatever type."""
        if self.config.hub:
            return _hub_values(self.config, self._revision, first)
        path, kind, field = self.files[number], self._formats[number], self.config.text_field
        values: Iterator[Any]
        if kind == "json":
            values = (_field(record, field, place) for place, record in json_records(path))
        elif kind == "text":
            values = iter([whole_text(path)])
        else:
            values = csv_values(path, field) if kind == "csv" else parquet_values(path, field)
        return islice(values, first, None)


def _format_of(path: Path, source: str) -> str:
    found = format_of(path)
    if found is None:
        known = " ".join(FORMATS)
        raise ValueError(
            f"source '{source}': the format of {shown(path)} cannot be inferred from its name (known: {known}); "
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
            f"{place} has no field '{field}' (there: {there}); name the one with the text: the source's text_field in "
            "a config, --text-field on a command line"
        )
    return record[field]


def _hub_values(config: SourceConfig, revision: str | None, first: int) -> Iterator[Any]:
    ensure_hub_cache()
    import datasets  # late: it takes seconds, and every tokenizing process would pay for it

    rows = datasets.load_dataset(
        config.hub, config.hub_config, split=config.split, revision=revision, streaming=True
    ).skip(first)
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        yield from _field(batch, config.text_field, "the dataset")


def _hub_revision(config: SourceConfig) -> str | None:
    """The commit to read, so that an interrupted preparation goes on with the same data; None for a local folder."""
    assert config.hub is not None
    if Path(config.hub).is_dir():
        return None
    ensure_hub_cache()
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(config.hub).sha
    except Exception as error:  # network, name, permission: all mean that the dataset cannot be had
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"source '{config.name}': the Hub does not give dataset '{config.hub}': {reason}") from error
