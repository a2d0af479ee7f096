"""Token files of others, each built here as its own project documents it: the same shards as from the text."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.config import DataConfig, SourceConfig, TokensConfig
from data.files import read_json
from data.prepare.__main__ import main
from data.prepare.run import prepare
from data.sources import Source
from data.store import TokenStore
from data.token_files import Vocabulary, closed
from data.tokenization import TextTokenizer, load_text_tokenizer, tokenizer_sha256
from data.tokenizer import train_tokenizer
from tests.data.helpers import config_of, contents, documents, write_jsonl
from tests.data.test_tokenization import write_byte_level

TEXTS = documents(120)
WRITERS: dict[str, Callable[[Path, list[list[int]], int], tuple[str, dict[str, Any]]]] = {}
"""By name: writes the ids of documents, which end with ``eos``, and says which file and how it is to be read."""


def writer(function: Callable[[Path, list[list[int]], int], tuple[str, dict[str, Any]]]) -> None:
    WRITERS[function.__name__] = function


def flat(all_ids: list[list[int]]) -> list[int]:
    return [token for ids in all_ids for token in ids]


@writer
def nanogpt(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """data/openwebtext/prepare.py: a memmap of uint16, the end of text behind every document."""
    array = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(len(flat(all_ids)),))
    array[:] = flat(all_ids)
    array.flush()
    return "train.bin", {"dtype": "uint16"}


@writer
def llm_c_gpt2(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """dev/data/data_common.py: 256 int32, then uint16; dev/data/fineweb.py puts the end of text before a document."""
    tokens = flat([[eos, *ids[:-1]] for ids in all_ids])
    start = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    (folder / "fineweb_train_000001.bin").write_bytes(start + struct.pack(f"<{len(tokens)}H", *tokens))
    return "fineweb_*.bin", {}


@writer
def llm_c_llama3(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """The same file's other header: uint32."""
    tokens = flat([[eos, *ids[:-1]] for ids in all_ids])
    start = struct.pack("<256i", 20240801, 7, len(tokens), *[0] * 253)
    (folder / "shard.bin").write_bytes(start + struct.pack(f"<{len(tokens)}I", *tokens))
    return "shard.bin", {}


@writer
def olmo(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """olmo/data/memmap_dataset.py: named .npy, and yet nothing but the ids."""
    (folder / "part-00-00000.npy").write_bytes(np.array(flat(all_ids), "<u4").tobytes())
    return "part-*.npy", {"dtype": "uint32"}


@writer
def numpy_save(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """A header that names a dtype, here a big-endian one of 8 bytes; the last document is not closed."""
    np.save(folder / "tokens.npy", np.array(flat(all_ids)[:-1], ">i8"))
    return "tokens.npy", {}


def write_pair(
    folder: Path,
    sequences: list[list[int]],
    borders: list[int],
    code: int = 8,
    modes: bool = False,
    magic: bytes = b"MMIDIDX\x00\x00",
) -> Path:
    """megatron/core/datasets/indexed_dataset.py: _IndexWriter and IndexedDatasetBuilder."""
    letter = {4: "i", 5: "q", 8: "H"}[code]
    data = [struct.pack(f"<{len(ids)}{letter}", *ids) for ids in sequences]
    (folder / "my_text_document.bin").write_bytes(b"".join(data))
    starts = [sum(map(len, data[:number])) for number in range(len(data))]
    index = magic + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(borders))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(starts)}q", *starts)
    index += struct.pack(f"<{len(borders)}q", *borders) + (bytes(len(sequences)) if modes else b"")
    (folder / "my_text_document.idx").write_bytes(index)
    return folder / "my_text_document.idx"


@writer
def megatron(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """With --append-eod, a sequence for each document."""
    write_pair(folder, all_ids, list(range(len(all_ids) + 1)))
    return "*.bin", {}


@writer
def megatron_sentences(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """With --split-sentences and without --append-eod: a document is several sequences, int32, and has no mark."""
    sequences, borders = [], [0]
    for ids in all_ids:
        sequences += [ids[:3], ids[3:-1]]
        borders.append(len(sequences))
    write_pair(folder, sequences, borders, code=4, modes=True)
    return "*.idx", {}


@writer
def json_lines(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """Half of the rows are closed."""
    rows = [ids if number % 2 else ids[:-1] for number, ids in enumerate(all_ids)]
    lines = "".join(
        json.dumps({"id": n, "input_ids": ids}) + "\n" for n, ids in enumerate([*rows[:5], None, [], *rows[5:]])
    )
    (folder / "ids.jsonl").write_text(lines)
    return "ids.jsonl", {}


@writer
def parquet(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    column = pyarrow.array([*all_ids, None], pyarrow.list_(pyarrow.uint16()))
    pyarrow.parquet.write_table(pyarrow.table({"tokens": column}), folder / "ids.parquet", row_group_size=50)
    return "ids.parquet", {"field": "tokens"}


def given(folder: Path, files: str, tokens: dict[str, Any], tokenizer: dict[str, Any], **changes: Any) -> DataConfig:
    sources = [{"name": "main", "files": [str(folder / files)], "tokens": tokens}]
    return config_of(folder, sources=sources, tokenizer=tokenizer, **changes)


@pytest.fixture(scope="module", params=["sentencepiece", "byte level with a mark before"])
def from_text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """What preparing the text gives."""
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "raw.jsonl", TEXTS)
    if request.param == "sentencepiece":
        config = config_of(folder)
    else:
        size = load_text_tokenizer(write_byte_level(folder / "data")).vocab_size
        config = config_of(folder, tokenizer={"kind": "huggingface", "vocab_size": size})
    train_tokenizer(config)
    prepare(config, workers=1)
    return config


@pytest.mark.parametrize("name", list(WRITERS))
def test_the_same_windows_as_from_the_text(from_text: DataConfig, tmp_path: Path, name: str) -> None:
    tokenizer = load_text_tokenizer(from_text.dir)
    all_ids = [tokenizer.encode_documents([text])[0].tolist() for text in TEXTS]
    files, tokens = WRITERS[name](tmp_path, all_ids, tokenizer.eos_id)
    settings = from_text.tokenizer.model_copy(update={"path": from_text.dir}).model_dump()
    config = given(tmp_path, files, tokens, settings, part_bytes=1 if name == "parquet" else 10**9)
    assert "taken from" in train_tokenizer(config)
    prepare(config, workers=1)
    theirs, ours = (TokenStore(Path(one.dir) / "train/main") for one in (config, from_text))
    assert ours.windows(16) == theirs.windows(16) > 100
    for number in range(ours.windows(16)):
        for one, other in zip(theirs.window(number, 16), ours.window(number, 16), strict=True):
            assert np.array_equal(one, other)
    manifest = theirs.manifest
    assert manifest.tokenizer_sha256 == tokenizer_sha256(from_text.dir) and manifest.text_bytes == 0
    assert (manifest.documents, manifest.eos_id, manifest.dtype) == (len(TEXTS), tokenizer.eos_id, "uint16")
    if manifest.made_from.get("parts", 1) == 1:
        shards = contents(Path(from_text.dir) / "train/main")
        assert shards.items() - contents(Path(config.dir) / "train/main").items() == {
            ("manifest.json", shards["manifest.json"])
        }


def test_both_halves_of_a_pair_are_known_by_their_fingerprints(tmp_path: Path, from_text: DataConfig) -> None:
    tokenizer = load_text_tokenizer(from_text.dir)
    all_ids = [tokenizer.encode_documents([text])[0].tolist() for text in TEXTS]
    index = write_pair(tmp_path, all_ids, list(range(len(all_ids) + 1)))
    settings = from_text.tokenizer.model_copy(update={"path": from_text.dir}).model_dump()
    config = given(tmp_path, "*.idx", {}, settings)
    train_tokenizer(config)
    prepare(config, workers=2)
    made_from = read_json(tmp_path / "data/train/main/manifest.json")["made_from"]
    assert [file["name"] for file in made_from["files"]] == ["my_text_document.bin", "my_text_document.idx"]
    assert made_from["settings"]["tokens"] == {"dtype": None, "end_id": None, "field": "input_ids"}
    prepare(config, workers=1)
    index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 0))
    with pytest.raises(ValueError, match=r"changed since: 1 source files .*my_text_document\.idx"):
        prepare(config, workers=1)


def test_interrupted_and_resumed(tmp_path: Path, from_text: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_text_tokenizer(from_text.dir)
    all_ids = [tokenizer.encode_documents([text])[0].tolist() for text in TEXTS]
    files, tokens = WRITERS["nanogpt"](tmp_path, all_ids, tokenizer.eos_id)
    settings = from_text.tokenizer.model_copy(update={"path": from_text.dir}).model_dump()
    config = given(tmp_path, files, tokens, settings)
    train_tokenizer(config)
    monkeypatch.setattr("data.token_files._READ_AT_ONCE", 100)
    monkeypatch.setattr("data.prepare.one_part.BATCH_BYTES", 3000)
    with monkeypatch.context() as patch:
        patch.setattr("data.token_files._split", _broken_off)
        with pytest.raises(ValueError, match="the disk is gone"):
            prepare(config, workers=1)
    assert len(list((tmp_path / "data/train/main").glob("shard-*.json"))) >= 1
    prepare(config, workers=1)
    store = TokenStore(tmp_path / "data/train/main")
    store.verify()
    assert store.manifest.documents == len(TEXTS)


def _broken_off(stream: np.ndarray, end_id: int) -> Any:
    ends = np.flatnonzero(stream == end_id)
    for start, end in zip([0, *(ends + 1)], ends[: len(ends) * 3 // 4], strict=False):
        yield stream[start:end]
    raise OSError("the disk is gone")


def test_duplicates_are_those_with_the_same_ids(tmp_path: Path, from_text: DataConfig) -> None:
    tokenizer = load_text_tokenizer(from_text.dir)
    all_ids = [tokenizer.encode_documents([text])[0].tolist() for text in TEXTS]
    files, tokens = WRITERS["json_lines"](tmp_path, [*all_ids, *all_ids[:7]], tokenizer.eos_id)
    settings = from_text.tokenizer.model_copy(update={"path": from_text.dir}).model_dump()
    config = given(tmp_path, files, tokens, settings, deduplicate="exact")
    train_tokenizer(config)
    manifest = prepare(config, workers=1)[0][1]
    distinct = len({tuple(ids) for ids in all_ids})
    assert manifest.documents == distinct and manifest.empty_documents == 2
    assert manifest.duplicate_documents == len(all_ids) + 7 - distinct >= 7


PREFIXED = Vocabulary(100, [1, 3], 2)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 6], [1, 3, 5, 6, 2]),
        ([5, 6, 2], [1, 3, 5, 6, 2]),
        ([1, 3, 5, 6], [1, 3, 5, 6, 2]),
        ([1, 3, 5, 6, 2], [1, 3, 5, 6, 2]),
        ([2, 5, 6], [1, 3, 5, 6, 2]),  # as llm.c opens a document
        ([2, 1, 3, 5, 2, 6, 2, 2], [1, 3, 5, 2, 6, 2]),  # one inside it is the document's
        ([1, 5], [1, 3, 1, 5, 2]),  # one of the two marks is a token of the document
        ([1, 3], []),
        ([1, 3, 2], []),
        ([2], []),
        ([2, 2], []),
        ([], []),
        (None, []),
    ],
    ids=str,
)
def test_marks_are_there_once(ids: Any, expected: list[int]) -> None:
    assert closed(ids, TokensConfig(), PREFIXED, "it").tolist() == expected


def test_another_end_token_becomes_the_tokenizers() -> None:
    assert closed([5, 0], TokensConfig(end_id=0), PREFIXED, "it").tolist() == [1, 3, 5, 2]
    assert closed([5, 2], TokensConfig(end_id=0), PREFIXED, "it").tolist() == [1, 3, 5, 2, 2]


@pytest.mark.parametrize("ids", ["text", [1.5], [True], [[1], [2]], [[1], [2, 3]], [None, 1], 7, {"a": 1}], ids=str)
def test_what_is_no_list_of_ids(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"it is no list of token ids, but .*; name the field .*: tokens\.field"):
        closed(ids, TokensConfig(), PREFIXED, "it")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_text_tokenizer(write_byte_level(tmp_path_factory.mktemp("tokenizer") / "data", begin=False))


def refused(folder: Path, tokenizer: TextTokenizer, files: str, tokens: dict[str, Any], sentence: str) -> None:
    """Preparation says so, in one sentence that names source and file."""
    settings = {"kind": "huggingface", "vocab_size": tokenizer.vocab_size, "path": str(tokenizer.file.parent)}
    config = given(folder, files, tokens, settings)
    train_tokenizer(config)
    shutil.rmtree(folder / "data/train", ignore_errors=True)
    with pytest.raises(ValueError, match=rf"^source 'main': cannot read .*: .*{sentence}") as told:
        prepare(config, workers=1)
    assert "\n" not in str(told.value)
    assert not (folder / "data/train/main/manifest.json").exists()


IDS = [[5, 6, 7, 300, 1], [8, 299, 10, 1]] * 50
"""Documents that end with 1, the end token of ``write_byte_level``."""


def stored(dtype: str, all_ids: list[list[int]] = IDS) -> bytes:
    return np.array(flat(all_ids), dtype).tobytes()


def header(*numbers: int, order: str = "<") -> bytes:
    """llm.c's."""
    return struct.pack(f"{order}256i", *numbers, *[0] * (256 - len(numbers)))


@pytest.mark.parametrize(
    ("content", "tokens", "sentence"),
    [
        (stored("<u2"), {}, r"says nothing of its dtype; set .*tokens\.dtype to uint16 or uint32"),
        (stored("<u2") + b"x", {"dtype": "uint16"}, r"901 bytes, .* no whole number of uint16"),
        (stored("<u4"), {"dtype": "uint16"}, r"every second of its ids is 0 .*dtype to uint32"),
        (stored("<u2"), {"dtype": "uint32"}, r"holds the id \d+ .*; read as uint16 all of them"),
        (stored(">u2"), {"dtype": "uint16"}, "read as uint16 of the other byte order all of them"),
        (stored(">u4"), {"dtype": "uint32"}, "read as .*uint32 of the other byte order all of"),
        (stored("<u2", [*IDS, [999, 1]]), {"dtype": "uint16"}, r"the id 999 at its place 450, .* tokens: t"),
        (stored("<u2"), {"dtype": "uint16", "end_id": 9}, r"none of its 450 ids is 9, the end of"),
        (header(20240520, 1, 9) + b"\1\0" * 8, {}, "counts 9 tokens of uint16, and 16 bytes foll"),
        (header(20240520, 1, 1) + b"\1\0", {"dtype": "uint32"}, "says uint16, and .*uint32; leave"),
        (header(20240801, 7, 1, order=">") + b"\1\0\0\0", {}, r"header \(llm\.c's\) is big-endian; swap"),
        (header(20240522, 1, 1) + b"\1\0", {}, "holds an evaluation of llm.c, not documents"),
        (b"\x93NUMPY\1\0broken", {}, "begins as numpy's format, and is not whole"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:40],
)  # fmt: skip
def test_flat_files_that_are_refused(
    tmp_path: Path, tokenizer: TextTokenizer, content: bytes, tokens: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path, tokenizer, "x.bin", tokens, sentence)


def test_arrays_that_are_no_row_of_ids(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 4), np.uint16))
    refused(tmp_path, tokenizer, "x.npy", {}, r"an array of uint16 \[3, 4\]; token ids are one row of integers")
    np.save(tmp_path / "x.npy", np.zeros(3, np.float32))
    refused(tmp_path, tokenizer, "x.npy", {}, r"an array of float32 \[3\]")
    np.save(tmp_path / "x.npy", np.array([5, -1, 1], np.int32))
    refused(tmp_path, tokenizer, "x.npy", {}, r"it holds the id -1 at its place 1")
    (tmp_path / "x.bin.gz").write_bytes(b"")
    refused(tmp_path, tokenizer, "x.bin.gz", {"dtype": "uint16"}, "mapped into memory as they are; decompress it")


def _changed(place: int, layout: str, value: Any) -> Callable[[Path], object]:
    def change(index: Path) -> None:
        content = bytearray(index.read_bytes())
        struct.pack_into(layout, content, place, value)
        index.write_bytes(content)

    return change


LENGTHS, STARTS = 34, 34 + 4 * len(IDS)
BORDERS = STARTS + 8 * len(IDS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_changed(0, "<9s", b"TNTIDX\0\0"), r"index of the lazy or cached kind; write the pair again as mmap"),
        (_changed(0, "<9s", b"SOMETHING"), r"no index of Megatron \(it does not begin with .*; restore it"),
        (_changed(9, ">Q", 1), r"is big-endian, and what is read is little-endian, version 1"),
        (_changed(9, "<Q", 2), r"is of version 2, and what is read"),
        (_changed(17, "<B", 7), r"the dtype code 7, which is none of integers"),
        (_changed(18, "<Q", 101), r"bytes, and its 101 sequences in 100 documents take"),
        (_changed(17, "<B", 4), r"negative or crooked|points behind the end|holds the id"),
        (_changed(STARTS + 8 * 99, "<q", 2**40), r"points behind the end of my_text_document\.bin: sequence 99"),
        (_changed(LENGTHS, "<i", -1), r"negative or crooked length or place"),
        (_changed(STARTS, "<q", 1), r"negative or crooked length or place"),
        (_changed(BORDERS + 8, "<q", 99), r"documents that do not follow each other"),
        (lambda index: index.write_bytes(index.read_bytes()[:-1]), r"100 documents take 2,042; restore it"),
        (lambda index: index.write_bytes(b""), r"no index of Megatron"),
        (lambda index: index.with_suffix(".bin").write_bytes(b"\1\0" * 449), "points behind the end of"),
        (lambda index: index.with_suffix(".bin").write_bytes(b"\1\0" * 460), "ends at byte 900 of .*which has 920"),
        (lambda index: index.with_suffix(".bin").write_bytes(b"\1" * 901), "901 bytes, which is no whole"),
        (lambda index: write_pair(index.parent, [[5, 999]], [0, 1]), r"document 0 holds the id 999 at its place 1"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_pairs_that_are_refused(
    tmp_path: Path, tokenizer: TextTokenizer, change: Callable[[Path], object], sentence: str
) -> None:
    index = write_pair(tmp_path, IDS, list(range(len(IDS) + 1)))
    change(index)
    refused(tmp_path, tokenizer, "*.idx", {}, sentence)


def test_half_a_pair(tmp_path: Path) -> None:
    write_pair(tmp_path, IDS, list(range(len(IDS) + 1))).with_suffix(".bin").unlink()
    config = SourceConfig.model_validate({"name": "main", "files": [str(tmp_path / "*.idx")], "tokens": {}})
    with pytest.raises(
        ValueError, match=r"source 'main': .*my_text_document\.bin is missing; a Megatron pair is my_tex"
    ):
        Source(config)


def test_lists_that_are_refused(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "x.jsonl").write_text('{"input_ids": [5, 1]}\n{"input_ids": [5, 999]}\n')
    refused(tmp_path, tokenizer, "x.jsonl", {}, r"document 1 holds the id 999 at its place 1")
    (tmp_path / "x.jsonl").write_text('{"input_ids": "a text"}\n')
    refused(tmp_path, tokenizer, "x.jsonl", {}, r"document 0 is no list of token ids, but 'a text'")
    refused(tmp_path, tokenizer, "x.jsonl", {"field": "ids"}, r"line 1 has no field 'ids' .*tokens\.field")


def test_settings_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source 'main' has tokens, which are no csv; leave its format out"):
        config_of(tmp_path, sources=[{"name": "main", "files": ["x.csv"], "format": "csv", "tokens": {}}])
    config = config_of(tmp_path, sources=[{"name": "main", "files": ["x.bin"], "tokens": {}}])
    with pytest.raises(ValueError, match=r"no source holds text to train a tokenizer on; .*tokenizer\.path"):
        train_tokenizer(config)


def test_text_and_tokens_in_one_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer is trained on what is text."""
    write_jsonl(tmp_path / "raw.jsonl", TEXTS)
    np.array([5, 6, 2] * 100, "<u2").tofile(tmp_path / "x.bin")
    sources = [
        {"name": "text", "files": [str(tmp_path / "raw.jsonl")]},
        {"name": "ids", "files": [str(tmp_path / "x.bin")], "tokens": {"dtype": "uint16"}},
    ]
    config = config_of(tmp_path, sources=sources)
    (tmp_path / "run.yaml").write_text(json.dumps({"data": config.model_dump(mode="json")}))
    assert "(text 20,000)" in train_tokenizer(config)
    monkeypatch.setattr("sys.argv", ["data.prepare", str(tmp_path / "run.yaml"), "--workers", "1"])
    main()
    said = capsys.readouterr().out
    assert "train/ids: 300 tokens, 100 documents, which came as tokens, 1 shard" in said
