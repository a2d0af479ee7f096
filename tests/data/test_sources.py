"""Reading: every format and compression, broken text, broken files."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.config import SourceConfig
from data.containers import _require_whole
from data.sources import Cursor, Source
from tune.config import ExampleSource

TEXTS = ["NA", "1.0", "a\r\nb", "", "null", "x" * 200_000, "é \u2028 \U0001f600", '"quoted", comma', " space "]


def source(*files: Path, **changes: object) -> Source:
    return Source(SourceConfig.model_validate({"name": "s", "files": [str(f) for f in files]} | changes))


START = Cursor(0, 0)


def texts(opened: Source, start: Cursor = START) -> list[str]:
    return [document.text.decode() for document in opened.documents(start)]


def as_jsonl(values: list[str]) -> bytes:
    # Neighbouring lines without a common schema, as in real corpora.
    lines = [json.dumps({"text": v, "meta": {"n": n} if n % 2 else "none"}) for n, v in enumerate(values)]
    return ("\n".join(lines) + "\n\n").encode()


def as_csv(path: Path, values: list[str]) -> bytes:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([[n, v] for n, v in enumerate(values)])
    content = path.read_bytes()
    path.unlink()
    return content


def two_frames(content: bytes) -> bytes:
    """What pzstd and ``cat`` make: several frames in one file."""
    compressor, middle = zstandard.ZstdCompressor(), len(content) // 2
    return compressor.compress(content[:middle]) + compressor.compress(content[middle:])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": two_frames,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_formats_and_compressions(tmp_path: Path, kind: str, suffix: str) -> None:
    content = {
        ".jsonl": as_jsonl(TEXTS),
        ".json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        ".csv": as_csv(tmp_path / "plain", TEXTS),
        ".txt": TEXTS[2].encode(),
    }[kind]
    # Brackets: a name that exists is no pattern. Only the library's reader of compressed CSV trips over them.
    stem = "a" if kind == ".csv" and suffix else "a[1]"
    path = tmp_path / f"{stem}{kind}{suffix}"
    path.write_bytes(COMPRESS[suffix](content))
    opened = source(path)
    assert texts(opened) == ([TEXTS[2]] if kind == ".txt" else TEXTS)
    if kind != ".txt":
        assert texts(opened, Cursor(0, 5)) == TEXTS[5:]


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [*TEXTS, None], "n": list(range(len(TEXTS) + 1))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert texts(source(tmp_path / "a.parquet")) == [*TEXTS, ""]
    with pytest.raises(ValueError, match=r"cannot read .*a\.parquet"):
        texts(source(tmp_path / "a.parquet", text_field="body"))


def test_hub_dataset_in_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(b"".join(b'{"body": "t%d"}\n' % n for n in range(200)))
    opened = Source(SourceConfig(name="s", hub=str(tmp_path / "set"), text_field="body"))
    assert texts(opened) == [f"t{n}" for n in range(200)]
    assert texts(opened, Cursor(0, 150)) == [f"t{n}" for n in range(150, 200)]
    assert opened.identity()["hub"]["name"] == str(tmp_path / "set")
    assert opened.label(Cursor(0, 5)) == str(tmp_path / "set")
    with pytest.raises(ValueError, match=r"no field 'text' \(found: body\)"):
        texts(Source(SourceConfig(name="s", hub=str(tmp_path / "set"))))


def test_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(ValueError, match="dataset 'nobody/nothing' cannot be read from the Hub: offline"):
        Source(SourceConfig(name="s", hub="nobody/nothing"))


def test_patterns_are_sorted_deep_and_without_repeats(tmp_path: Path) -> None:
    for name in ("b/c/2.txt", "a/1.txt", "b/1.txt", "b/.hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    opened = source(tmp_path / "**" / "*.txt", tmp_path / "a" / "1.txt")
    assert texts(opened) == ["a/1.txt", "b/1.txt", "b/c/2.txt"]
    assert texts(opened, Cursor(1, 1)) == ["b/c/2.txt"]
    assert opened.label(Cursor(1, 1)) == "1.txt (2 of 3)"


def test_invalid_unicode_is_replaced_and_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgood \xff bad")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\\ud800y"}\n{"text": "\xfe"}\n{"text": "\\ud83d\\ude00"}\n')
    found = list(source(tmp_path / "a.txt", tmp_path / "b.jsonl").documents(Cursor(0, 0)))
    assert [d.text.decode() for d in found] == ["good \ufffd bad", "x\ufffdy", "\ufffd", "\U0001f600"]
    assert [d.repaired for d in found] == [True, True, True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl: line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl: line 2 has no field 'text' \(found: body\)"),
        ("a.jsonl", b'"x"\n', r"a\.jsonl: line 1 has no field 'text' \(found: str\)"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl: document 0: field 'text' must hold text, got int"),
        ("a.json", b'[{"text": "x"}, 5]', r"a\.json: item 1 has no field"),
        ("a.csv", b"body\nx\n", r"a\.csv: .*text"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz"),
        ("a.parquet", b"not parquet", r"a\.parquet"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(source(tmp_path / name))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_cut_compressed_files_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    noise = [os.urandom(400).hex() for _ in range(2000)]
    content = as_jsonl(noise) if kind == ".jsonl" else as_csv(tmp_path / "plain", noise)
    compressed = COMPRESS[suffix](content)
    (tmp_path / f"a{kind}{suffix}").write_bytes(compressed[: len(compressed) * 3 // 4])
    with pytest.raises(ValueError, match=rf"cannot read .*a\{kind}\{suffix}"):
        texts(source(tmp_path / f"a{kind}{suffix}"))


def test_every_cut_of_a_zst_file_is_noticed_without_decompressing_it(tmp_path: Path) -> None:
    """Frames with and without checksum and size, of literal, repeated and compressed blocks, and a skippable one."""
    options = [(level, checksum, size) for level in (1, 19) for checksum in (True, False) for size in (True, False)]
    bodies = [b"", b"x", b"a" * 300_000, os.urandom(140_000), b"the cat " * 20_000]
    frames = [
        zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=size).compress(body)
        for level, checksum, size in options
        for body in bodies
    ] + [b"\x53\x2a\x4d\x18\x05\0\0\0skipp"]
    path = tmp_path / "a.txt.zst"
    for frame in frames:
        before = zstandard.compress(b"before ")
        for cut in {1, 3, 4, 5, 6, 8, 9, len(frame) // 2, len(frame) - 5, len(frame) - 4, len(frame) - 1} - {0}:
            if 0 < cut < len(frame):
                path.write_bytes(before + frame[:cut])
                with pytest.raises(ValueError, match=r"a\.txt\.zst: the compressed file is cut off"):
                    texts(source(path))
        path.write_bytes(before + frame)
        _require_whole(path)


def test_the_folder_of_texts_is_filled_in_when_a_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run's own config says where they were, and goes on from there."""
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setenv("HOPSCOTCH_TEXTS", str(tmp_path))
    config = SourceConfig.model_validate({"name": "s", "files": ["{texts}/*.txt"]})
    assert config.files == [f"{tmp_path}/*.txt"] and texts(Source(config)) == ["x"]
    assert ExampleSource.model_validate({"name": "s", "files": ["{texts}/a"]}).files == [f"{tmp_path}/a"]
    monkeypatch.delenv("HOPSCOTCH_TEXTS")
    assert SourceConfig.model_validate({"name": "s", "files": ["{texts}/a"]}).files == ["../shared/data/a"]


def test_files_that_cannot_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPSCOTCH_TEXTS", raising=False)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"source 's': no file matches '.*\*\.txt'"):
        source(tmp_path / "*.txt")
    with pytest.raises(
        ValueError, match=r"where \{texts\} is \.\./shared/data; set HOPSCOTCH_TEXTS to the folder of these"
    ):
        source(Path("../shared/data/none.jsonl"))
    with pytest.raises(ValueError, match=r"format of .*a\.bin cannot be inferred"):
        source(tmp_path / "a.bin")
    assert texts(source(tmp_path / "a.bin", format="text")) == ["x"]
