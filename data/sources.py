"""One source's documents, in an order that depends on nothing but the source, from any point on.

Text and JSON files are read here, line by line, because a corpus's JSON lines rarely share one schema and a document's
line ends must stay as they are. Parquet, CSV and datasets on the Hub go through the ``datasets`` library, streaming.
Memory holds one document (text, JSON lines) or one chunk of the library's at a time; only a JSON file that is one big
array is held whole.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from data.config import SourceConfig

FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
COMPRESSIONS = (".gz", ".xz", ".zst")
EDGE_BYTES = 65_536
"""How much of a file's start and end goes into its fingerprint."""
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
            ValueError: a pattern matches no file, or a file's format cannot be told.
        """
        self.config = config
        self._revision = _hub_revision(config) if config.hub else None
        self.files = [] if config.hub else _matching_files(config)
        self._formats = [config.format or _format_of(path, config.name) for path in self.files]

    def identity(self) -> dict[str, Any]:
        """What tells this source from a changed one: its files' names, sizes and fingerprints, or the Hub revision."""
        if self.config.hub:
            hub = {"name": self.config.hub, "config": self.config.hub_config, "split": self.config.split}
            return {"hub": {**hub, "revision": self._revision}}
        return {"files": [_fingerprint(path) for path in self.files]}

    def label(self, cursor: Cursor) -> str:
        """What is being read at ``cursor``, for a progress line."""
        if not self.files:
            return str(self.config.hub)
        number = min(cursor.file, len(self.files) - 1)
        return f"{self.files[number].name} ({number + 1} of {len(self.files)})"

    def documents(self, start: Cursor) -> Iterator[Document]:
        """Every document from ``start`` on, the ones without text included.

        Raises:
            ValueError: a file cannot be read, or a document has no text field; the sentence names the file.
        """
        for number in range(start.file, max(len(self.files), 1)):
            yield from self.file_documents(number, start.document if number == start.file else 0)

    def file_documents(self, number: int, first: int = 0) -> Iterator[Document]:
        """The documents of file ``number`` (0 for the Hub), from its document ``first`` on."""
        place = str(self.files[number]) if self.files else f"Hub dataset {self.config.hub}"
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
        if kind == "json":
            return islice((_field(record, field, place) for place, record in json_records(path)), first, None)
        if path.suffix == ".zst":
            require_whole_zstd(path)
        return islice(_whole_file(path) if kind == "text" else _table_values(path, kind, field), first, None)


def open_raw(path: Path) -> io.BufferedIOBase:
    """A file's decompressed bytes; the compression is told from the name."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader, 1 << 20)
    return path.open("rb")


def _matching_files(config: SourceConfig) -> list[Path]:
    found: set[str] = set()
    for pattern in config.files:
        wide = str(Path(pattern.replace("{stdlib}", sysconfig.get_paths()["stdlib"])).expanduser())
        # A name that exists is taken as it is: "a[1].txt" would match nothing as a pattern.
        names = [wide] if Path(wide).is_file() else [n for n in glob.glob(wide, recursive=True) if Path(n).is_file()]
        if not names:
            where = "" if Path(wide).is_absolute() else f" in {Path.cwd()}, which relative paths start from"
            raise ValueError(f"source '{config.name}': no file matches '{pattern}'{where}; correct data.*.files")
        found.update(names)
    return [Path(name) for name in sorted(found)]


def format_of(path: Path) -> str | None:
    """A file's format by its name, a compression's ending left out; None for an ending that is not known."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return FORMATS.get(suffix.lower())


def _format_of(path: Path, source: str) -> str:
    found = format_of(path)
    if found is None:
        known = " ".join(FORMATS)
        raise ValueError(
            f"source '{source}': the format of {path} cannot be told from its name (known: {known}); "
            "set the source's format to text, json, parquet or csv"
        )
    return found


def _fingerprint(path: Path) -> dict[str, Any]:
    """A file's name, size and a SHA-256 of its first and last 64 KiB: cheap, and unlike a time it survives a copy."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(size - EDGE_BYTES, 0))
        digest.update(file.read(EDGE_BYTES))
    return {"name": path.name, "bytes": size, "edges_sha256": digest.hexdigest()}


def _to_utf8(value: Any, field: str, index: int) -> tuple[bytes, bool]:
    """One text value as UTF-8, and whether anything in it had to be replaced."""
    if value is None:
        return b"", False
    if isinstance(value, bytes):
        value = value.removeprefix(codecs.BOM_UTF8)
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


def _whole_file(path: Path) -> Iterator[bytes]:
    with open_raw(path) as file:
        yield file.read()


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Every record of JSON lines or of one array, and where it stands: ``line 1`` or ``item 0``.

    A byte that is not UTF-8 becomes a lone surrogate in its string.

    Raises:
        ValueError: naming the line that is not JSON.
    """
    if path.suffix == ".zst":
        require_whole_zstd(path)
    with open_raw(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    with open_raw(path) as file:
        if start.startswith(b"["):
            yield from ((f"item {number}", record) for number, record in enumerate(json.loads(file.read())))
            return
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
            if line:
                try:
                    record = json.loads(line.decode(errors="surrogateescape"))
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON ({error}); correct it") from None
                yield f"line {number}", record


def _field(record: Any, field: str, place: str) -> Any:
    if not isinstance(record, dict) or field not in record:
        there = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"{place} has no field '{field}' (there: {there}); name the one with the text: the source's text_field in "
            "a config, --text-field on a command line"
        )
    return record[field]


def _table_values(path: Path, kind: str, field: str) -> Iterator[Any]:
    # Imported here: it takes seconds, and every tokenizing process would pay for it.
    import datasets

    options: dict[str, Any] = {"columns": [field]}
    if kind == "csv":  # as text: "NA" and "1.0" are documents, not a missing value and a number
        features = datasets.Features({field: datasets.Value("string")})
        options = {"usecols": [field], "features": features, "keep_default_na": False}
    rows = datasets.load_dataset(
        kind, data_files=[glob.escape(str(path.resolve()))], split="train", streaming=True, **options
    )
    for batch in rows.iter(batch_size=ROWS_AT_ONCE):
        yield from batch[field]


def _hub_values(config: SourceConfig, revision: str | None, first: int) -> Iterator[Any]:
    import datasets  # late for the same reason as above

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
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(config.hub).sha
    except Exception as error:  # network, name, permission: all mean that the dataset cannot be had
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"source '{config.name}': the Hub does not give dataset '{config.hub}': {reason}") from error


def require_whole_zstd(path: Path) -> None:
    """Refuse a cut-off .zst: unlike gzip and xz, its reader ends quietly where the bytes end."""
    frame = None
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise ValueError("the compressed file is cut off")
