"""Tokenizers: both kinds give the same face, and prompt and response meet where generation puts them together."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.files import sha256_of
from data.tokenizer import load_tokenizer
from tune.text import TextTokenizer, load_text_tokenizer

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "a review: positive",
    "a review: negative",
    "naïve café 😀",
] * 50
PROMPT, RESPONSE = "the brown fox:", " jumps over"


def write_byte_level(folder: Path, begin: bool = True, **beside: Any) -> Path:
    """A ``tokenizer.json`` as Llama 3's, with ``tokenizer_config.json`` unless other files are given by name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (beside or {"tokenizer_config": {"eos_token": "</s>"}}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_spaced(folder: Path) -> Path:
    """A ``tokenizer.json`` as Llama 2's: a space before every text, and bytes for what has no piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # no piece spans two words
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return folder


def write_spaced_sentencepiece(folder: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(params=["ours", "byte level", "spaced", "spaced sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, corpus: dict[str, Any]) -> TextTokenizer:
    if request.param == "ours":
        return load_text_tokenizer(corpus["dir"])
    write = {"byte level": write_byte_level, "spaced": write_spaced, "spaced sentencepiece": write_spaced_sentencepiece}
    return load_text_tokenizer(write[request.param](tmp_path))


def test_one_face(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    assert ids and tokenizer.decode(ids) == PROMPT
    assert tokenizer.encode("") == []
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert max(ids) < tokenizer.vocab_size and tokenizer.eos_id not in ids
    assert len(tokenizer.sha256) == 64
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("the fox\n")]
    assert "".join(pieces).lstrip("▁").startswith("the▁fox")
    assert all(isinstance(tokenizer.piece(token), str) for token in range(tokenizer.vocab_size))


def test_prompt_and_response_together_are_the_whole_text(tokenizer: TextTokenizer) -> None:
    prompt, response = tokenizer.segments([PROMPT, RESPONSE])
    assert tokenizer.decode(prompt + response) == PROMPT + RESPONSE
    assert prompt == tokenizer.encode(PROMPT)
    # One space before the response's first word, and not two.
    written = "".join(tokenizer.piece(token) for token in response)
    assert written.startswith("▁") and not written.startswith("▁▁")
    assert tokenizer.segments([PROMPT, ""]) == [tokenizer.encode(PROMPT), []]


def test_segments_follow_each_other(tokenizer: TextTokenizer) -> None:
    texts = ["the ", "fox", "", " jumps", " over"]
    segments = tokenizer.segments(texts)
    assert len(segments) == len(texts)
    assert tokenizer.decode([token for segment in segments for token in segment]) == "".join(texts)


def test_a_token_across_the_border_belongs_to_the_response(tmp_path: Path) -> None:
    tokenizer = load_text_tokenizer(write_spaced(tmp_path))
    whole = tokenizer.encode("the brown fox")
    prompt, response = tokenizer.segments(["the bro", "wn fox"])
    assert prompt + response == whole and tokenizer.decode(prompt) == "the"
    assert tokenizer.decode(response).strip() == "brown fox"


def test_ours_puts_nothing_before_and_closes_with_eos(corpus: dict[str, Any]) -> None:
    tokenizer, processor = load_text_tokenizer(corpus["dir"]), load_tokenizer(corpus["dir"])
    assert tokenizer.prefix == [] and tokenizer.eos_id == processor.eos_id()
    assert tokenizer.vocab_size == processor.vocab_size()
    assert tokenizer.encode(PROMPT) == processor.encode(PROMPT)
    assert tokenizer.sha256 == sha256_of(Path(corpus["dir"]) / "tokenizer.model")


def test_an_import_is_read_from_its_json_although_a_model_lies_beside(tmp_path: Path) -> None:
    write_spaced_sentencepiece(tmp_path)
    tokenizer = load_text_tokenizer(write_byte_level(tmp_path))
    assert tokenizer.sha256 == sha256_of(tmp_path / "tokenizer.json")
    assert tokenizer.prefix == [0] and tokenizer.piece(0) == "<s>"
    assert 0 not in tokenizer.encode("the")
    # Saved with truncation to 4 and with padding, neither of which may touch an example.
    assert tokenizer.decode(tokenizer.encode(PROMPT * 5)) == PROMPT * 5
    assert load_text_tokenizer(write_byte_level(tmp_path / "plain", begin=False)).prefix == []


def test_byte_level_pieces_are_readable(tmp_path: Path) -> None:
    tokenizer = load_text_tokenizer(write_byte_level(tmp_path))
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("a fox\n")]
    assert pieces == ["a", "▁fox", "\n"]


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": 5}},
        {"tokenizer_config": {"eos_token": {"content": "</s>"}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}},
        {"generation_config": {"eos_token_id": [1, 7]}},
        {"config": {"eos_token_id": 1}},
    ],
)
def test_the_end_of_document_token_is_found(tmp_path: Path, beside: dict[str, Any]) -> None:
    assert load_text_tokenizer(write_byte_level(tmp_path, **beside)).eos_id == 1


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"config": {"model_type": "llama"}}, "no end-of-document token"),
        ({"generation_config": {"eos_token_id": []}}, "no end-of-document token"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, "eos_token is '<end>', which is no token of"),
        ({"generation_config": {"eos_token_id": 4000}}, "eos_token_id is 4000, which is no token of"),
        ({"generation_config": {"eos_token_id": -1}}, "eos_token_id is -1, which is no token of"),
    ],
)
def test_a_missing_or_wrong_end_of_document_token(tmp_path: Path, beside: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_text_tokenizer(write_byte_level(tmp_path, **beside))


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor tokenizer\.model; set data\.tokenizer"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        load_text_tokenizer(tmp_path)
