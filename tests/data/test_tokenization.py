"""Tokenizers: both kinds give the same face, and prompt and response meet where generation puts them together."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data import tokenizer_json
from data.files import sha256_of
from data.prepare.run import prepare
from data.sentencepiece_file import load_tokenizer
from data.split_points import PART_CHARACTERS
from data.tokenization import TextTokenizer, load_text_tokenizer, tokenizer_sha256
from data.tokenizer import train_tokenizer
from data.tokenizer_json import sample_lines
from tests.data.helpers import config_of, write_jsonl

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "a review: positive",
    "a review: negative",
    "naïve café 😀",
] * 50
AS_LLAMA = {
    "model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity",
    "add_dummy_prefix": True, "remove_extra_whitespaces": False,
}  # fmt: skip
PROMPT, RESPONSE = "the brown fox:", " jumps over"


def write_byte_level(folder: Path, begin: bool = True, pad: bool = True, **beside: Any) -> Path:
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
    if pad:
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


def write_sentencepiece(folder: Path, **settings: Any) -> Path:
    """A ``tokenizer.model`` as Llama 2's, a space before every text, but for ``settings``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, hard_vocab_limit=False,
        minloglevel=2, **{**AS_LLAMA, **settings},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(params=["ours", "byte level", "spaced", "spaced sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path, corpus: dict[str, Any]) -> TextTokenizer:
    if request.param == "ours":
        return load_text_tokenizer(corpus["dir"])
    write = {"byte level": write_byte_level, "spaced": write_spaced, "spaced sentencepiece": write_sentencepiece}
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
    prompt, response = tokenizer.split(PROMPT, RESPONSE)
    assert tokenizer.decode(prompt + response) == PROMPT + RESPONSE
    assert prompt == tokenizer.encode(PROMPT)
    # One space before the response's first word, and not two.
    written = "".join(tokenizer.piece(token) for token in response)
    assert written.startswith("▁") and not written.startswith("▁▁")
    assert tokenizer.split(PROMPT, "") == (tokenizer.encode(PROMPT), [])


def test_segments_follow_each_other(tokenizer: TextTokenizer) -> None:
    texts = ["the ", "fox", "", " jumps", " over"]
    segments = tokenizer.segments(texts)
    assert len(segments) == len(texts)
    assert tokenizer.decode([token for segment in segments for token in segment]) == "".join(texts)


def test_a_token_across_the_border_belongs_to_the_response(tmp_path: Path) -> None:
    tokenizer = load_text_tokenizer(write_spaced(tmp_path))
    whole = tokenizer.encode("the brown fox")
    prompt, response = tokenizer.split("the bro", "wn fox")
    assert prompt + response == whole and tokenizer.decode(prompt) == "the"
    assert tokenizer.decode(response).strip() == "brown fox"


def test_ours_puts_nothing_before_and_closes_with_eos(corpus: dict[str, Any]) -> None:
    tokenizer, processor = load_text_tokenizer(corpus["dir"]), load_tokenizer(corpus["dir"])
    assert tokenizer.prefix == [] and tokenizer.eos_id == processor.eos_id()
    assert tokenizer.vocab_size == processor.vocab_size()
    assert tokenizer.encode(PROMPT) == processor.encode(PROMPT)
    assert tokenizer.sha256 == sha256_of(Path(corpus["dir"]) / "tokenizer.model")


def test_an_import_is_read_from_its_json_although_a_model_lies_beside(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
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
        ({"tokenizer_config": {"eos_token": "<end>"}}, "eos_token is '<end>', which is not a token of"),
        ({"generation_config": {"eos_token_id": 4000}}, "eos_token_id is 4000, which is not a token of"),
        ({"generation_config": {"eos_token_id": -1}}, "eos_token_id is -1, which is not a token of"),
    ],
)
def test_a_missing_or_wrong_end_of_document_token(tmp_path: Path, beside: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_text_tokenizer(write_byte_level(tmp_path, **beside))


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"neither tokenizer\.json nor tokenizer\.model; copy there the one .* or name a folder with"
    ):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").touch()
    with pytest.raises(
        ValueError, match=r"let transformers write tokenizer\.json: AutoTokenizer\.from_pretrained\(F\)"
    ):
        load_text_tokenizer(tmp_path)


LONG = "".join(f"{' ' * (n % 3)}the fox {n} jumps\n" + "\n" * (n % 4 == 0) for n in range(7000))
"""124,000 characters and more, with line breaks in rows and spaces after them."""


@pytest.mark.parametrize(
    ("settings", "cuts"),
    [
        ({}, True),
        ({"add_dummy_prefix": False}, True),
        ({"user_defined_symbols": ["\n"]}, True),
        ({"user_defined_symbols": ["\n\n", "\n the"]}, False),  # cut after the first line break these would be torn
        ({"byte_fallback": False}, False),  # line breaks are unknown, and unknown characters in a row are one token
        ({"model_type": "unigram"}, False),
    ],
    ids=str,
)
def test_a_long_text_has_the_ids_of_the_uncut_one(tmp_path: Path, settings: dict[str, Any], cuts: bool) -> None:
    tokenizer = load_text_tokenizer(write_sentencepiece(tmp_path, **settings))
    assert (tokenizer.border is not None) == cuts
    assert len(LONG) > 3 * PART_CHARACTERS
    for text in (LONG, f"  {LONG}", "x " * PART_CHARACTERS, *sample_lines_of(300)):
        assert tokenizer.encode(text) == tokenizer.processor.encode(text)


def sample_lines_of(count: int) -> list[str]:
    return list(islice(sample_lines(), count))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, r"changes text before splitting .*\(normalisation nmt_nfkc\)"),
        ({"normalization_rule_name": "nfkc_cf"}, r"\(normalisation nfkc_cf\), so training would not see the original"),
        ({"remove_extra_whitespaces": True}, r"\(remove_extra_whitespaces True\).*train one with data.tokenizer"),
        ({"treat_whitespace_as_suffix": True}, r"\(treat_whitespace_as_suffix True\)"),
        ({"model_type": "char", "vocab_size": 300}, r"must be of type bpe or unigram, the kinds that can be exported"),
    ],
    ids=str,
)
def test_models_that_change_text_are_refused_by_the_first_command(
    tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    write_sentencepiece(tmp_path / "data", **settings)
    with pytest.raises(ValueError, match=sentence):
        load_text_tokenizer(tmp_path / "data")
    write_jsonl(tmp_path / "raw.jsonl", ["one\ntwo"])
    for command in (train_tokenizer, lambda config: prepare(config, workers=1)):
        with pytest.raises(ValueError, match=sentence):
            command(config_of(tmp_path))


@pytest.mark.parametrize(
    ("config", "before"),
    [
        ({}, []),
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "</s>"}}, [2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1]),
    ],
    ids=str,
)
def test_what_stands_before_a_text_is_what_transformers_puts_there(
    tmp_path: Path, config: dict[str, Any], before: list[int]
) -> None:
    (write_sentencepiece(tmp_path, add_dummy_prefix=False) / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = load_text_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.prefix == before
    for text in ("the fox", " two\n\n  lines", "naïve 😀"):
        assert theirs(text)["input_ids"][: len(before) + 2] == [*before, *tokenizer.encode(text)][: len(before) + 2]
    ids, lengths = tokenizer.encode_documents(["a", "", "b"])
    documents = [[*before, *tokenizer.encode(text), tokenizer.eos_id] for text in "ab"]
    assert ids.tolist() == [token for ids_of in documents for token in ids_of] and lengths.tolist() == [
        len(documents[0]),
        0,
        len(documents[1]),
    ]


def test_a_begin_token_that_is_no_piece(tmp_path: Path) -> None:
    config = {"add_bos_token": True, "bos_token": "<begin>"}
    (write_sentencepiece(tmp_path) / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"add_bos_token, but bos_token '<begin>' is not a piece of .*; correct it"):
        load_text_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"330": {"content": "<|chat|>", "special": True}}}},
        {"added_tokens": {"<|chat|>": 330}},
        {"added_tokens": {"<|chat|>": 5}},
    ],
    ids=str,
)
def test_tokens_that_a_sentencepiece_model_does_not_hold(tmp_path: Path, beside: dict[str, Any]) -> None:
    write_sentencepiece(tmp_path)
    for name, content in beside.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"add the token '<\|chat\|>' \(\d+\), which it lacks and only a tokeniz"):
        load_text_tokenizer(tmp_path)


HARD = [
    "the fox", "  two  spaces\n\n\tthe", "</s> the <s>", "<|chat|>the<|chat|> fox", "ﬁ ½ e\u0301 中文 🙂", "<pad>", "",
    "a\u0000b", "▁ literal", "\r\n\u2028",
]  # fmt: skip


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"eos_token": "</s>"}},
        {"tokenizer_config": {"eos_token": "</s>", "split_special_tokens": True}},
        {"tokenizer_config": {"eos_token": "</s>", "add_bos_token": False, "pad_token": "<pad>"}},
        {"tokenizer_config": {"eos_token": "</s>", "additional_special_tokens": ["<|chat|>", "<|end|>"]}},
        {"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {
            "0": {"content": "<s>", "special": True}, "1": {"content": "</s>", "special": True},
            "400": {"content": "<|chat|>", "special": False, "lstrip": True}}}},
        {"tokenizer_config": {"eos_token": "</s>", "extra_special_tokens": {"chat_token": "<|chat|>"}}},
        {"special_tokens_map": {"eos_token": "</s>", "pad_token": {"content": "<pad>"}}, "added_tokens": {}},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("begin", [True, False])
def test_a_tokenizer_json_has_transformers_ids(tmp_path: Path, beside: dict[str, Any], begin: bool) -> None:
    """Tokens that files beside it add included, numbered alike."""
    folder = write_byte_level(tmp_path, begin=begin, pad=False, **beside)
    tokenizer, theirs = load_text_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in HARD:
        assert tokenizer.prefix + tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tokenizer.vocab_size == len(theirs)
    assert tokenizer.prefix == ([0] if begin else [])


def test_marks_behind_every_text(tmp_path: Path) -> None:
    """The end-of-document token is put there once, by us; another cannot be honoured."""
    folder = write_byte_level(tmp_path)
    content = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for mark, token in (("</s>", 1), ("<s>", 0)):
        content.post_processor = processors.TemplateProcessing(single=f"$A {mark}", special_tokens=[(mark, token)])
        content.save(str(folder / "tokenizer.json"))
        if mark == "</s>":
            tokenizer = load_text_tokenizer(folder)
            assert tokenizer.prefix == [] and tokenizer.encode_documents(["the"])[0][-1] == 1
            assert 1 not in tokenizer.encode("the")
        else:
            with pytest.raises(
                ValueError, match=r"puts \['<s>'\] after every text, but here documents end with '</s>'"
            ):
                load_text_tokenizer(folder)


def test_stage_one_reads_a_tokenizer_json_and_puts_what_it_puts(tmp_path: Path) -> None:
    """Preparation, and everything else that asks for the folder's tokenizer, take the same file."""
    write_sentencepiece(tmp_path / "data")
    write_byte_level(tmp_path / "data")
    texts = ["the fox", "a review: positive\n"]
    write_jsonl(tmp_path / "raw.jsonl", texts)
    tokenizer = load_text_tokenizer(tmp_path / "data")
    config = config_of(tmp_path, tokenizer={"kind": "huggingface", "vocab_size": tokenizer.vocab_size})
    assert "tokenizer.json is taken as it is" in train_tokenizer(config)
    with pytest.raises(ValueError, match=r"tokens, but data.tokenizer.vocab_size is 320; set it"):
        train_tokenizer(config_of(tmp_path, tokenizer={"kind": "huggingface", "vocab_size": 320}))
    manifest = prepare(config, workers=1)[0][1]
    assert manifest.vocab_size == tokenizer.vocab_size and manifest.eos_id == 1
    assert manifest.tokenizer_sha256 == tokenizer_sha256(tmp_path / "data") == tokenizer.sha256
    tokens = np.fromfile(tmp_path / "data/train/main/shard-00000.bin", "<u2").tolist()
    assert tokens == [token for text in texts for token in [0, *tokenizer.encode(text), 1]]


def test_a_document_that_anothers_model_prepares_has_no_spaces_put_in(tmp_path: Path) -> None:
    """124,000 characters and more, as one document, come back as they were."""
    write_sentencepiece(tmp_path / "data")
    write_jsonl(tmp_path / "raw.jsonl", [LONG])
    config = config_of(tmp_path, tokenizer={"vocab_size": 330}, shard_tokens=1_000_000)
    prepare(config, workers=1)
    processor = load_tokenizer(tmp_path / "data")
    tokens = np.fromfile(tmp_path / "data/train/main/shard-00000.bin", "<u2").tolist()
    assert tokens == [*processor.encode(LONG), processor.eos_id()] and processor.decode(tokens[:-1]) == LONG


def test_a_model_that_transformers_would_not_follow_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sentencepiece(tmp_path / "data")
    write_jsonl(tmp_path / "raw.jsonl", ["one"])
    merges = tokenizer_json._merges
    monkeypatch.setattr(tokenizer_json, "_merges", lambda proto: merges(proto)[::-1])
    with pytest.raises(ValueError, match=r"transformers would give other ids than .*data/tokenizer.model for \d+ of"):
        prepare(config_of(tmp_path, tokenizer={"vocab_size": 330}), workers=1)
