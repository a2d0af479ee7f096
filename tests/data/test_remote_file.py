"""Files in a bucket are found, read and prepared as those of a folder are: every format, compressed or not."""

from __future__ import annotations

import gzip
import json
import lzma
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data import urls
from data.config import DataConfig, SourceConfig
from data.discovery import find_files, fingerprint, format_of
from data.prepare.run import prepare
from data.remote_file import RemoteFile
from data.sources import Cursor, Source
from tests.s3 import S3

LINES = b"".join(json.dumps({"text": f"document {number} " + "x" * number}).encode() + b"\n" for number in range(300))


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def found(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def both(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same files in a folder and in a bucket."""
    import pyarrow
    import pyarrow.parquet

    folder, url = tmp_path_factory.mktemp("corpus"), s3.bucket("corpus")
    texts = [json.loads(line)["text"] for line in LINES.splitlines()]
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(LINES))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(LINES))
    (folder / "e.txt").write_text("\ufeffnaïve text")
    (folder / "f.csv").write_text("text,other\n" + "\n".join(f"{text},1" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "g.parquet", row_group_size=100)
    (folder / "sub").mkdir()
    (folder / "sub/h [1].jsonl").write_bytes(LINES[:200])
    for path in folder.rglob("*"):
        if path.is_file():
            s3.client.upload_file(str(path), "corpus", str(path.relative_to(folder)))
    return folder, url


def documents(*files: str) -> list[bytes]:
    source = Source(SourceConfig(name="some", files=list(files)))
    return [document.text for document in source.documents(Cursor(0, 0))]


def test_every_format_is_read_as_from_a_folder(both: tuple[Path, str]) -> None:
    folder, url = both
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.jsonl.zst", "e.txt", "f.csv", "g.parquet"):
        there = documents(f"{url}/{name}")
        assert there == documents(str(folder / name)) and len(there) in (1, 300), name
    local, remote = (Source(SourceConfig(name="x", files=[f"{place}/*"])) for place in both)
    assert list(remote.pieces(100)) == list(local.pieces(100))
    assert remote.identity() == local.identity()


def test_patterns_names_and_doubles(both: tuple[Path, str]) -> None:
    folder, url = both
    for pattern in ("*", "*.jsonl*", "**/*.jsonl", "[ab].*", "sub/*", "sub/h [1].jsonl"):
        expected = [str(path.relative_to(folder)) for path in find_files([f"{folder}/{pattern}"])]
        there = find_files([f"{url}/{pattern}"])
        assert [str(path).removeprefix(f"{url}/") for path in there] == expected and expected
    assert len(find_files([f"{url}/a.jsonl", f"{url}/*.jsonl", f"{folder}/a.jsonl", f"file://{folder}/a.jsonl"])) == 2
    with pytest.raises(ValueError, match=f"no file matches '{url}/none"):
        find_files([f"{url}/none*.jsonl"])


def test_a_remote_file_is_a_path(both: tuple[Path, str]) -> None:
    folder, url = both
    (path,) = find_files([f"{url}/b.jsonl.gz"])
    assert isinstance(path, RemoteFile) and str(path) == f"{url}/b.jsonl.gz" and path.name == "b.jsonl.gz"
    assert format_of(path) == "json" and path.is_file() and fingerprint(path) == fingerprint(folder / "b.jsonl.gz")
    again = pickle.loads(pickle.dumps(path))
    assert (
        again == path and type(again) is RemoteFile and again.stat().st_size == (folder / "b.jsonl.gz").stat().st_size
    )


def test_what_cannot_be_had_is_told(s3: S3, both: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    s3.bucket("closed")
    s3.client.put_object(Bucket="closed", Key="a.txt", Body=b"1234")
    s3.deny("closed", "GetObject")
    with pytest.raises(ValueError, match=r"source 'some': cannot read s3://closed/a.txt: Forbidden"):
        documents("s3://closed/*")

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError("Access Denied")

    with monkeypatch.context() as closed:  # moto lists all the same
        closed.setattr(urls.open_filesystem("s3://closed", remember=True)[0], "ls", denied)
        with pytest.raises(
            ValueError, match=r"files: s3://closed/b\* cannot be listed \(PermissionError: .*grant access"
        ):
            find_files(["s3://closed/b*"])
    with pytest.raises(ValueError, match="the protocol 's33' is not known; did you mean 's3'"):
        find_files(["s33://closed/*"])
    s3.client.put_object(Bucket="corpus", Key="bad/t.bin", Body=b"1234")
    with pytest.raises(
        ValueError, match=r"source 'ids': s3://corpus/bad/t.bin is a file of token ids, .*copy it to one"
    ):
        Source(SourceConfig.model_validate({"name": "ids", "files": ["s3://corpus/bad/t.bin"], "tokens": {}}))
    s3.client.put_object(Bucket="corpus", Key="bad/cut.jsonl.gz", Body=gzip.compress(LINES)[:-50])
    with pytest.raises(ValueError, match=r"source 'some': cannot read s3://corpus/bad/cut.jsonl.gz: Compressed file"):
        documents("s3://corpus/bad/cut.jsonl.gz")


def test_shards_are_the_same_bytes(both: tuple[Path, str], corpus: dict[str, Any], tmp_path: Path) -> None:
    """By several processes, each of which opens the bucket for itself."""
    made = []
    for place in both:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        for file in Path(corpus["dir"]).glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        sources = [{"name": "all", "files": [f"{place}/*.jsonl*", f"{place}/g.parquet"]}]
        block = corpus | {"dir": str(folder), "sources": sources, "validation": [], "part_bytes": 20_000}
        prepare(DataConfig.model_validate(block), workers=2)
        made.append({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert made[0] == made[1] and any(name.endswith(".bin") for name in made[0])
