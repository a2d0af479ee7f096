"""The formats of text files: compressions, encodings, JSON, tables.

Everything here yields values in the order of the file, holding one document (or one chunk of a table) in memory; only a
JSON file that is one big array, and a compressed Parquet file, are held whole. Text in UTF-16 or UTF-32 is recognised
by the byte order mark at its start and converted to UTF-8; without a mark, text is UTF-8, and what is not text is
refused.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from data.discovery import COMPRESSIONS
from data.remote_file import RemoteFile

MARKS = (  # UTF-32's first: one of them begins with one of UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
OTHERS = (
    (b"\x1f\x8b", "compressed with gzip: give it a name that ends in .gz"),
    (b"\xfd7zXZ\0", "compressed with xz: give it a name that ends in .xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: give it a name that ends in .zst"),
    (b"BZh91AY&SY", "compressed with bzip2, which is not supported: compress it as .gz, .xz or .zst"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer to a file that was not downloaded: run git lfs pull",
    ),
)
"""How files that are not text begin, whatever their names say."""
UNREADABLE = (ValueError, OSError, EOFError, RecursionError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What a broken file or a wrong line raises."""
_READ_BYTES = 1 << 20
_ZSTD_WINDOW_BYTES = 1 << 31
"""What ``zstd --long=31`` needs, the most that the zstd tool accepts."""
_ZSTD_HEADER_BYTES = 18
"""Longest header of a frame."""
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
_START_BYTES = 4096
_TEXT_BYTES_A_NUL = 10
"""Bytes per NUL below which a file is not text: a stray NUL may be, one in two or four bytes is another encoding."""
_ROWS_AT_ONCE = 64


def open_bytes(path: Path) -> io.BufferedReader:
    """A file's decompressed bytes; the compression is inferred from the name. An empty file holds none."""
    file: Any = path.open("rb")
    if not path.stat().st_size:
        return file
    if path.suffix == ".gz":
        file = gzip.GzipFile(fileobj=file)
    elif path.suffix == ".xz":
        file = _Xz(file)
    elif path.suffix == ".zst":
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        file = decompressor.stream_reader(file, read_across_frames=True)
    else:
        return file
    return io.BufferedReader(file, _READ_BYTES)


class _Xz(io.RawIOBase):
    """The contents of an .xz, all of its streams: Python's own reader silently stops at zeros between two."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decompressor: lzma.LZMADecompressor | None = lzma.LZMADecompressor()
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._decompressor is not None:
            if self._decompressor.eof:
                self._next_stream(self._decompressor.unused_data)
                continue
            chunk, self._rest = self._rest, b""
            if self._decompressor.needs_input and not chunk and not (chunk := self._file.read(_READ_BYTES)):
                raise EOFError("the compressed file is cut off")
            if made := self._decompressor.decompress(chunk, max_length=len(buffer)):
                buffer[: len(made)] = made
                return len(made)
        return 0

    def _next_stream(self, rest: bytes) -> None:
        """Skip the zeros that may pad a stream, and begin with what follows them."""
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._file.read(_READ_BYTES)):
                self._decompressor = None
                return
        self._rest, self._decompressor = rest, lzma.LZMADecompressor()

    def close(self) -> None:
        self._file.close()
        super().close()


def open_text(path: Path) -> io.BufferedReader:
    """A file's text as UTF-8 without a byte order mark.

    Invalid UTF-8 stays as it is; what is invalid in another encoding becomes a byte that is invalid UTF-8.

    Raises:
        ValueError: its start is not that of a text.
    """
    file = open_bytes(path)
    start = file.peek(_START_BYTES)[:_START_BYTES]
    encoding = next((encoding for mark, encoding in MARKS if start.startswith(mark)), None)
    if encoding is not None:
        return io.BufferedReader(_AsUtf8(file, encoding), _READ_BYTES)
    _require_text(start)
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def _require_text(start: bytes) -> None:
    """Refuse what would silently become meaningless tokens."""
    other = next((what for begins, what in OTHERS if start.startswith(begins)), None)
    if other is not None:
        raise ValueError(f"it is {other}")
    if start.count(0) > len(start) // _TEXT_BYTES_A_NUL:
        raise ValueError(
            f"it is not text, or it is UTF-16 or UTF-32 without a byte order mark: its first {len(start):,} bytes hold "
            f"{start.count(0):,} NULs; convert it to UTF-8, or leave it out"
        )


_KEPT_WRONG = "hopscotch.kept_wrong"
codecs.register_error(_KEPT_WRONG, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class _AsUtf8(io.RawIOBase):
    """Bytes in another encoding, read as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)(errors=_KEPT_WRONG)
        self._ready = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            chunk = self._file.read(_READ_BYTES)
            self._ended = not chunk
            self._ready = self._decoder.decode(chunk, final=self._ended).encode(errors="surrogateescape")
        taken, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def whole_text(path: Path) -> bytes:
    """All of a file as UTF-8, see :func:`open_text`."""
    _require_whole(path)
    with open_text(path) as file:
        return file.read()


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Every record of JSON lines or of one array, and its place: ``line 1`` or ``item 0``.

    A byte that is not UTF-8 becomes a lone surrogate in its string, an integer of thousands of digits a float.

    Raises:
        ValueError: naming the line that is not JSON.
    """
    _require_whole(path)
    with open_text(path) as file:
        if file.peek(_START_BYTES)[:_START_BYTES].lstrip().startswith(b"["):
            records = _parsed(file.read(), "the array")
            yield from ((f"item {number}", record) for number, record in enumerate(records))
            return
        for number, line in enumerate(file, start=1):
            if line := line.strip():
                yield f"line {number}", _parsed(line, f"line {number}")


def _parsed(text: bytes, place: str) -> Any:
    decoded = text.decode(errors="surrogateescape")
    try:
        try:
            return json.loads(decoded)
        except json.JSONDecodeError:
            raise
        except ValueError:  # Python refuses to read such an integer, which is valid JSON
            return json.loads(decoded, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); correct it") from None


def csv_values(path: Path, column: str) -> Iterator[bytes]:
    """A column as text: "NA" and "1.0" are documents, not a missing value and a number.

    A row that is shorter than the header ends with empty fields; fields beyond the header's must be empty.

    Raises:
        ValueError: there is no such column, or a row is broken.
    """
    rows = _csv_rows(path)
    if (header := next(rows, None)) is None:
        return
    _require_column(column, header)
    place = header.index(column)
    for number, row in enumerate(rows, start=1):
        if any(field.strip() for field in row[len(header) :]):
            raise ValueError(
                f"row {number} has {len(row)} fields, but the header has {len(header)}; put quotes around texts with "
                "commas"
            )
        yield row[place].encode(errors="surrogateescape") if place < len(row) else b""


def _csv_rows(path: Path) -> Iterator[list[str]]:
    """Every row except empty ones and those of white space."""
    ended = False

    def lines(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal ended
        yield from text
        ended = True

    csv.field_size_limit(sys.maxsize)
    _require_whole(path)
    with open_text(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        for number, row in enumerate(csv.reader(lines(text))):
            if ended:  # in the middle of a row
                raise ValueError(f"row {number} opens a quote that is never closed; close it, or restore the file")
            if row and not (len(row) == 1 and row[0].isspace()):
                yield row


def parquet_row_groups(path: Path) -> list[tuple[int, int]]:
    """First row and compressed bytes of every row group; none for a file that is compressed as a whole."""
    if path.suffix in COMPRESSIONS:
        return []
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(_for_arrow(path))
    groups, row = [], 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        groups.append((row, sum(group.column(number).total_compressed_size for number in range(group.num_columns))))
        row += group.num_rows
    return groups


def parquet_values(path: Path, column: str, first: int = 0, end: int | None = None) -> Iterator[Any]:
    """A column's values, rows ``first`` up to ``end``; row groups outside are not read.

    Strings are returned as bytes, so that invalid Unicode does not make the file unreadable.

    Raises:
        ValueError: there is no such column, or the file is broken.
    """
    import pyarrow
    import pyarrow.parquet

    if not path.stat().st_size:
        return
    _require_whole(path)
    source = _for_arrow(path)
    if path.suffix in COMPRESSIONS:
        with open_bytes(path) as file:
            source = pyarrow.BufferReader(file.read())
    with pyarrow.parquet.ParquetFile(source) as table:
        _require_column(column, table.schema_arrow.names)
        rows = [table.metadata.row_group(number).num_rows for number in range(table.metadata.num_row_groups)]
        starts = [0, *accumulate(rows)]
        last = starts[-1] if end is None else min(end, starts[-1])
        groups = [number for number in range(len(rows)) if starts[number] < last and starts[number + 1] > first]
        if not groups:
            return
        row = starts[groups[0]]
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=groups, columns=[column]):
            wanted = batch.column(0).slice(max(first - row, 0), max(last - max(row, first), 0))
            row += len(batch)
            if pyarrow.types.is_string(wanted.type) or pyarrow.types.is_large_string(wanted.type):
                wanted = wanted.cast(pyarrow.large_binary())
            yield from wanted.to_pylist()


def _for_arrow(path: Path) -> Any:
    """What pyarrow reads from: the file's name, or the open file if it is at a URL."""
    return path.open("rb") if isinstance(path, RemoteFile) else str(path)


def _require_column(column: str, there: list[str]) -> None:
    if column not in there:
        raise ValueError(
            f"there is no column '{column}' (found: {', '.join(there) or 'none'}); name the one with the text: "
            "text_field of the source (for token ids: tokens.field) in a config, --text-field on a command line"
        )


def _require_whole(path: Path) -> None:
    """Refuse a truncated .zst: unlike gzip's and xz's, its reader ends silently where the bytes end.

    Walks over the sizes of frames and blocks (RFC 8878, 3.1) without decompressing them. Other errors are left to the
    decompressor.
    """
    if path.suffix != ".zst":
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        place = 0
        while place < size:
            file.seek(place)
            place = _zstd_frame_end(file, place)
    if place > size:
        raise ValueError("the compressed file is cut off")


def _zstd_frame_end(file: BinaryIO, place: int) -> int:
    """Where the frame that begins at ``place`` ends, or a place beyond the end of a truncated file."""
    start = file.read(_ZSTD_HEADER_BYTES)
    if start[1:4] == _ZSTD_SKIPPABLE and start[0] >> 4 == 5:
        return place + 8 + int.from_bytes(start[4:8], "little")
    try:
        checksum_bytes = 4 if zstandard.get_frame_parameters(start).has_checksum else 0
        place += zstandard.frame_header_size(start)
    except zstandard.ZstdError:
        if len(start) < 5 or (len(start) < _ZSTD_HEADER_BYTES and start.startswith(zstandard.FRAME_HEADER)):
            return place + _ZSTD_HEADER_BYTES
        raise
    last = False
    while not last:
        file.seek(place)
        if len(block := file.read(3)) < 3:
            return place + 3
        header = int.from_bytes(block, "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        place += 3 + (1 if kind == 1 else size)  # a run-length block stores its byte once
    return place + checksum_bytes
