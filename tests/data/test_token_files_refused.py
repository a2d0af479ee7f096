"""Token files that are damaged, of another kind than they seem, or read with wrong settings: one sentence each."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import SourceConfig, TokensConfig
from data.prepare.run import prepare
from data.sources import Source
from data.token_files import closed
from data.tokenization import TextTokenizer, load_text_tokenizer
from data.tokenizer import train_tokenizer
from tests.data.helpers import config_of
from tests.data.test_tokenization import write_byte_level
from tests.data.token_files import PREFIXED, flat, given, write_pair


@pytest.mark.parametrize("ids", ["text", [1.5], [True], [[1], [2]], [[1], [2, 3]], [None, 1], 7, {"a": 1}], ids=str)
def test_what_is_no_list_of_ids(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"it is not a list of token ids, but .*; name the field .*: tokens\.field"):
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
        (stored("<u2"), {}, r"it does not state its dtype; set .*tokens\.dtype to uint16 or uint32"),
        (stored("<u2") + b"x", {"dtype": "uint16"}, r"901 bytes, .* not a multiple of the size of uint16"),
        (stored("<u4"), {"dtype": "uint16"}, r"every second id is 0 .*dtype to uint32"),
        (stored("<u2"), {"dtype": "uint32"}, r"holds the id \d+ .*; read as uint16 all of them"),
        (stored(">u2"), {"dtype": "uint16"}, "read as uint16 of the other byte order all of them"),
        (stored(">u4"), {"dtype": "uint32"}, "read as .*uint32 of the other byte order all of"),
        (stored("<u2", [*IDS, [999, 1]]), {"dtype": "uint16"}, r"the id 999 at index 450, .* tokens: t"),
        (stored("<u2"), {"dtype": "uint16", "end_id": 9}, r"none of its 450 ids is 9, the end-of"),
        (header(20240520, 1, 9) + b"\1\0" * 8, {}, "counts 9 tokens of uint16, but 16 bytes foll"),
        (header(20240520, 1, 1) + b"\1\0", {"dtype": "uint32"}, "says uint16, but .*uint32; leave"),
        (header(20240801, 7, 1, order=">") + b"\1\0\0\0", {}, r"header \(llm\.c's\) is big-endian; swap"),
        (header(20240522, 1, 1) + b"\1\0", {}, "it is an llm.c evaluation set, not documents"),
        (b"\x93NUMPY\1\0broken", {}, r"begins like a \.npy file, but is not a complete one"),
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
    refused(tmp_path, tokenizer, "x.npy", {}, r"an array of uint16 \[3, 4\]; token ids must be a one-dimensional array")
    np.save(tmp_path / "x.npy", np.zeros(3, np.float32))
    refused(tmp_path, tokenizer, "x.npy", {}, r"an array of float32 \[3\]")
    np.save(tmp_path / "x.npy", np.array([5, -1, 1], np.int32))
    refused(tmp_path, tokenizer, "x.npy", {}, r"it holds the id -1 at index 1")
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
        (_changed(0, "<9s", b"SOMETHING"), r"not a Megatron index \(it does not begin with .*; restore it"),
        (_changed(9, ">Q", 1), r"is big-endian, but only little-endian version 1"),
        (_changed(9, "<Q", 2), r"is of version 2, but only"),
        (_changed(17, "<B", 7), r"the dtype code 7, which is not an integer type"),
        (_changed(18, "<Q", 101), r"bytes, but its 101 sequences in 100 documents need"),
        (_changed(17, "<B", 4), r"multiple of \d bytes|points past the end|holds the id"),
        (_changed(STARTS + 8 * 99, "<q", 2**40), r"points past the end of my_text_document\.bin: sequence 99"),
        (_changed(LENGTHS, "<i", -1), r"negative length or offset, or an offset that is not a multiple of 2 bytes"),
        (_changed(STARTS, "<q", 1), r"negative length or offset, or an offset that is not a multiple of 2 bytes"),
        (_changed(BORDERS + 8, "<q", 99), r"documents that do not cover the sequences"),
        (lambda index: index.write_bytes(index.read_bytes()[:-1]), r"100 documents need 2,042; restore it"),
        (lambda index: index.write_bytes(b""), r"not a Megatron index"),
        (lambda index: index.with_suffix(".bin").write_bytes(b"\1\0" * 449), "points past the end of"),
        (lambda index: index.with_suffix(".bin").write_bytes(b"\1\0" * 460), "ends at byte 900 of .*which has 920"),
        (lambda index: index.with_suffix(".bin").write_bytes(b"\1" * 901), "901 bytes, which is not a multiple"),
        (lambda index: write_pair(index.parent, [[5, 999]], [0, 1]), r"document 0 holds the id 999 at index 1"),
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
    refused(tmp_path, tokenizer, "x.jsonl", {}, r"document 1 holds the id 999 at index 1")
    (tmp_path / "x.jsonl").write_text('{"input_ids": "a text"}\n')
    refused(tmp_path, tokenizer, "x.jsonl", {}, r"document 0 is not a list of token ids, but 'a text'")
    refused(tmp_path, tokenizer, "x.jsonl", {"field": "ids"}, r"line 1 has no field 'ids' .*tokens\.field")


def test_settings_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"source 'main' has tokens, which cannot be read from csv; leave its format out"
    ):
        config_of(tmp_path, sources=[{"name": "main", "files": ["x.csv"], "format": "csv", "tokens": {}}])
    config = config_of(tmp_path, sources=[{"name": "main", "files": ["x.bin"], "tokens": {}}])
    with pytest.raises(ValueError, match=r"no source holds text to train a tokenizer on; .*tokenizer\.path"):
        train_tokenizer(config)
