"""Ids in transformers are SentencePiece's, or the export is refused."""

from __future__ import annotations

import io
import json
import sysconfig
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from convert.hf_tokenizer import write_tokenizer
from data import tokenizer_json
from data.sentencepiece_file import load_tokenizer
from data.tokenization import SentencePiece, load_text_tokenizer
from data.tokenizer_json import compare_ids, convert, sample_lines

Train = Callable[..., Path]
AS_OURS = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "pad_id": 3,
}  # fmt: skip


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train a small SentencePiece model with other settings; its folder."""

    def make(**settings: Any) -> Path:
        model, text = io.BytesIO(), Path(sysconfig.get_paths()["stdlib"]) / "heapq.py"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.read_text().splitlines()), model_writer=model, vocab_size=360,
            hard_vocab_limit=False, minloglevel=2, **{**AS_OURS, **settings},
        )  # fmt: skip
        (tmp_path / "trained").mkdir()
        (tmp_path / "trained/tokenizer.model").write_bytes(model.getvalue())
        (tmp_path / "out").mkdir()
        return tmp_path / "trained"

    return make


def test_ten_thousand_lines_of_code_and_prose(corpus: dict[str, Any], tmp_path: Path) -> None:
    ids, done = write_tokenizer(Path(corpus["dir"]), tmp_path, 400, 128)
    processor, theirs = load_tokenizer(corpus["dir"]), AutoTokenizer.from_pretrained(tmp_path)
    lines = list(islice(sample_lines(), 10_000))
    assert len(lines) == 10_000 and sum(len(line) > 20 for line in lines) > 5000
    assert theirs(lines)["input_ids"] == [processor.encode(line) for line in lines]
    assert ids == {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 3}
    assert "ids are the same on 4,000 of 4,000 lines" in done
    assert (theirs.eos_token, theirs.pad_token, theirs.model_max_length) == ("</s>", "<pad>", 128)
    for text in ("  two  spaces\n\n\tand 1234 ½ 中文 🙂", "</s> <pad> are text"):
        assert theirs.decode(theirs(text)["input_ids"]) == text == processor.decode(processor.encode(text))
    assert (tmp_path / "tokenizer.model").is_file()
    # A batch's prompts end where their continuations begin, and generate takes all that comes with them.
    batch = theirs(["a", "two words"], padding=True)
    assert sorted(batch) == ["attention_mask", "input_ids"] and batch["attention_mask"][0][0] == 0


def test_a_space_before_every_text(train: Train) -> None:
    folder = train(add_dummy_prefix=True)
    tokenizer = load_text_tokenizer(folder)
    assert isinstance(tokenizer, SentencePiece)
    converted, lines = convert(tokenizer), list(islice(sample_lines(), 3000))
    assert compare_ids(tokenizer, converted, lines) == []
    assert converted.decode(converted.encode("two words").ids) == "two words"


def test_unigram_is_told(train: Train) -> None:
    folder = train(model_type="unigram")
    _, done = write_tokenizer(folder, folder.parent / "out", 400, 128)
    assert "it is a unigram model, whose ids can differ where two segmentations of a text score the same" in done


@pytest.mark.parametrize("before", [True, False])
def test_an_imports_begin_token_and_chat_template_are_exported(train: Train, before: bool) -> None:
    """Of a checkpoint that came with a ``tokenizer.model`` alone."""
    folder = train(add_dummy_prefix=True)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": before,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids, _ = write_tokenizer(folder, folder.parent / "out", 400, 128)
    ours, theirs = load_text_tokenizer(folder), AutoTokenizer.from_pretrained(folder.parent / "out")
    assert ours.prefix == ([1] if before else []) and ids["bos_token_id"] == (1 if before else 2)
    lines = list(islice(sample_lines(), 1000))
    assert theirs(lines)["input_ids"] == [ours.prefix + ours.encode(line) for line in lines]
    assert (
        theirs.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
        == f"{'<s>' if before else '</s>'}hello"
    )
    again = load_text_tokenizer(folder.parent / "out")  # as a tokenizer.json now
    assert [again.prefix + again.encode(line) for line in lines] == theirs(lines)["input_ids"]
    assert again.encode("a </s> b") == ours.encode("a </s> b")


def test_other_ids_are_refused(corpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = tokenizer_json._merges
    monkeypatch.setattr(tokenizer_json, "_merges", lambda proto: merges(proto)[::-1])
    with pytest.raises(ValueError, match=r"would give other ids than .* for \d+ of 4,000 lines, such as .*; train one"):
        write_tokenizer(Path(corpus["dir"]), tmp_path, 400, 128)


def test_a_tokenizer_json_is_copied_as_it_is(corpus: dict[str, Any], tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir()
    write_tokenizer(Path(corpus["dir"]), first, 400, 128)
    (first / "tokenizer.model").unlink()
    ids, done = write_tokenizer(first, second, 400, 128)
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    assert ids == {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 3} and "copied from" in done
    (first / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    ids, _ = write_tokenizer(first, third, 400, 128)
    assert ids == {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 3}


def test_a_tokenizer_that_does_not_fit(corpus: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"has 400 pieces, but the model's vocabulary is 300: there is no embedding for .*, whose id is 300; give",
    ):
        write_tokenizer(Path(corpus["dir"]), tmp_path, 300, 128)
    assert not list(tmp_path.iterdir())
