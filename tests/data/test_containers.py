"""Encodings, windows of decompressors, odd but valid containers. Formats and cut files: tests/data/test_sources.py."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.config import SourceConfig
from data.containers import csv_values, json_records, parquet_values
from data.sources import Cursor, Source
from tune.config import ExampleSource

TEXT = "naïve \U0001f600\r\nтекст\n"


def read(path: Path, **fields: Any) -> list[str]:
    config = SourceConfig.model_validate({"name": "s", "files": [str(path)], **fields})
    return [document.text.decode() for document in Source(config).documents(Cursor(0, 0))]


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_text_in_the_encoding_that_its_first_bytes_say(tmp_path: Path, mark: str, suffix: str) -> None:
    boms = {
        "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
        "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE, "utf-8-sig": b"",
    }  # fmt: skip
    files = {
        "a.txt": TEXT,
        "a.jsonl": json.dumps({"text": TEXT}, ensure_ascii=False) + "\n",
        "a.json": json.dumps([{"text": TEXT}], ensure_ascii=False),
        "a.csv": 'n,text\n1,"' + TEXT + '"\n',
    }
    for name, content in files.items():
        raw = boms[mark] + content.encode(mark)
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(lzma.compress(raw) if suffix else raw)
        assert read(path) == [TEXT], name


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize(
    ("mark", "encoding", "wrong"),
    [
        (codecs.BOM_UTF16_LE, "utf-16-le", b"\x00\xd8"),
        (codecs.BOM_UTF16_BE, "utf-16-be", b"\xdc\x00"),
        (codecs.BOM_UTF32_LE, "utf-32-le", b"\x00\x00\x00\xff"),
    ],
)
def test_what_is_wrong_in_another_encoding_is_replaced_and_counted(
    tmp_path: Path, name: str, mark: bytes, encoding: str, wrong: bytes
) -> None:
    before, after = {"a.txt": ("ab", "cd"), "a.jsonl": ('{"text": "ab', 'cd"}\n'), "a.csv": ("text\nab", "cd\n")}[name]
    (tmp_path / name).write_bytes(mark + before.encode(encoding) + wrong + after.encode(encoding))
    config = SourceConfig(name="s", files=[str(tmp_path / name)])
    (document,) = Source(config).documents(Cursor(0, 0))
    assert (document.text.decode(), document.repaired) == ("ab\ufffdcd", True)


def test_half_a_character_at_the_end_of_another_encoding_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + "ab".encode("utf-16-le") + b"\x00")
    assert read(tmp_path / "a.txt") == ["ab\ufffd"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.xz"])
def test_another_encoding_without_a_mark_is_refused(tmp_path: Path, encoding: str, name: str) -> None:
    raw = 'text\n{"text": "hello"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(lzma.compress(raw) if name.endswith(".xz") else raw)
    with pytest.raises(
        ValueError, match=rf"cannot read .*{name}: it is not text, or it is UTF-16 or UTF-32 without a byte order mark"
    ):
        read(tmp_path / name)


def test_a_stray_nul_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a page, cut\0 short")
    (tmp_path / "b.txt").write_text("")
    assert read(tmp_path / "a.txt") == ["a page, cut\0 short"]
    assert read(tmp_path / "b.txt") == [""]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"text"), "gzip: give it a name that ends in .gz"),
        (lzma.compress(b"text"), "xz: give it a name"),
        (zstandard.compress(b"text"), "zstd: give it a name"),
        (bz2.compress(b"text"), "bzip2, which is not supported"),
        (b"PK\x03\x04", "a zip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
    ids=["gzip", "xz", "zstd", "bzip2", "zip", "lfs"],  # gzip puts the time into its header
)
def test_what_only_its_name_says_is_text(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}: it is .*{said}"):
        read(tmp_path / name)


def test_tuning_reads_other_encodings_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"prompt": "é", "response": "x"}).encode("utf-16"))
    assert list(json_records(tmp_path / "a.jsonl")) == [("line 1", {"prompt": "é", "response": "x"})]
    assert ExampleSource.model_validate({"name": "s", "files": ["a"]}).format == "response"


@pytest.mark.parametrize("zeros", [0, 4, 3 << 20])
def test_an_xz_of_several_streams_with_zeros_between_and_behind_is_read_to_its_end(tmp_path: Path, zeros: int) -> None:
    lines = [json.dumps({"text": f"{number} " * 5000}) + "\n" for number in range(50)]
    parts = [lzma.compress("".join(lines[at : at + 25]).encode()) + bytes(zeros) for at in (0, 25)]
    (tmp_path / "a.jsonl.xz").write_bytes(b"".join(parts))
    assert read(tmp_path / "a.jsonl.xz") == [json.loads(line)["text"] for line in lines]


def test_what_follows_an_xz_and_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(b'{"text": "a"}\n') + b"something else" * 9)
    with pytest.raises(ValueError, match=r"cannot read .*a\.jsonl\.xz: Input format not supported"):
        read(tmp_path / "a.jsonl.xz")


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_the_longest_windows_of_zstd(tmp_path: Path, window_log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj()  # of unknown size, as from a pipe: the frame asks for the whole window
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(b"long " * 1000) + stream.flush())
    assert read(tmp_path / "a.txt.zst") == ["long " * 1000]


def test_containers_without_documents(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "a.json", "a.parquet", "a.jsonl.xz", "a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).touch()
        assert read(tmp_path / name) == []
    (tmp_path / "a.csv").write_text("n,text\n")
    (tmp_path / "a.json").write_text("[]")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.json", "a.parquet"):
        assert read(tmp_path / name) == []


@pytest.mark.parametrize("rows", ["1,hello,\n2,world,\n", "1,hello,, \n2,world\n", "1,hello\n2,world\n"])
def test_a_comma_at_the_end_of_rows_moves_no_column(tmp_path: Path, rows: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,text\n{rows}")
    assert list(csv_values(tmp_path / "a.csv", "text")) == [b"hello", b"world"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("1,Hello, world, this is lost\n2,fine\n", "row 1 has 4 fields, but the header has 2; put quotes around texts"),
        ('1,"one, two"\n\n2,hello,x\n', "row 2 has 3 fields"),
        ('1,"the start\n2,of it\n', "row 1 opens a quote that is never closed"),
    ],
)
def test_rows_of_a_table_that_would_lose_text(tmp_path: Path, rows: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(f"id,text\n{rows}")
    with pytest.raises(ValueError, match=rf"^source 's': cannot read .*a\.csv: {said}"):
        read(tmp_path / "a.csv")


def test_what_a_row_of_a_table_may_hold(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f'\nid,text\n1,"a, ""b""\r\nc"\n2\n  \n3,5" disk\n\n4,{long}\n5,NA', newline="")
    assert read(tmp_path / "a.csv") == ['a, "b"\r\nc', "", '5" disk', long, "NA"]


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,body\n1,x\n")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"no column 'text' \(found: n, body\)"):
        list(csv_values(tmp_path / "a.csv", "text"))
    with pytest.raises(ValueError, match=r"no column 'text' \(found: n\)"):
        list(parquet_values(tmp_path / "a.parquet", "text"))
    with pytest.raises(ValueError, match=r"no column 'text' \(found: none\)"):
        list(parquet_values(tmp_path / "none.parquet", "text"))


def test_numbers_and_depths_that_python_refuses(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": ' + "9" * 5000 + "}\n")
    assert read(tmp_path / "a.jsonl") == ["x"]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read(tmp_path / "a.jsonl")


def test_bytes_that_are_no_unicode_in_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\nab\xffc\n")
    column = pyarrow.array([b"ab\xffc", b"ok"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.csv") == ["ab\ufffdc"] and read(tmp_path / "a.parquet") == ["ab\ufffdc", "ok"]


def test_a_local_folder_of_the_hub_that_changed_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "a"}\n')
    config = SourceConfig(name="s", hub=str(tmp_path / "set"))
    before = Source(config).identity()
    assert Source(config).identity() == before
    (tmp_path / "set/train.jsonl").write_text('{"text": "b"}\n')
    assert Source(config).identity() != before
