"""Token files of others become the same shards as the text: every kind, interrupted, with duplicates and marks."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, TokensConfig
from data.files import read_json
from data.prepare.__main__ import main
from data.prepare.run import prepare
from data.store import TokenStore
from data.token_files import closed
from data.tokenization import load_text_tokenizer, tokenizer_sha256
from data.tokenizer import train_tokenizer
from tests.data.helpers import config_of, contents, documents, write_jsonl
from tests.data.test_tokenization import write_byte_level
from tests.data.token_files import PREFIXED, WRITERS, given, write_pair

TEXTS = documents(120)


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
    with pytest.raises(ValueError, match=r"1 source file \(my_text_document\.idx: other content of the same size\)"):
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
    assert "train/ids: 300 tokens, 100 documents, read as token ids, 1 shard" in said
