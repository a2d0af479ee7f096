"""Stage one with a Hugging Face tokenizer: trained here, taken from a folder, encoded in parts and by threads."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from convert.hf_tokenizer import write_tokenizer
from data.batches import TrainingData
from data.config import DataConfig, SourceConfig
from data.prepare.encode import Encoder
from data.prepare.run import prepare
from data.prepare.tasks import Task
from data.sources import Cursor, Document
from data.split_points import BEFORE_SPACE, KNOWN_PATTERNS, border_of, parts
from data.tokenization import load_text_tokenizer, tokenizer_sha256
from data.tokenizer import train_tokenizer
from data.tokenizer_training import BYTE_LEVEL_CONFIG
from tests.data.helpers import config_of, contents, documents, prepared, write_jsonl
from tests.data.test_tokenization import write_byte_level, write_sentencepiece
from tests.data.test_tokenizer import NASTY

ROOT = Path(__file__).parents[2]
TRAINED = {"kind": "huggingface", "vocab_size": 320, "train_bytes": 20_000}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    write_jsonl(folder / "raw.jsonl", documents(200))
    assert "tokenizer.json: 320 tokens, trained on 20,000 bytes (main 20,000)" in train_tokenizer(
        config_of(folder, tokenizer=TRAINED)
    )
    return folder / "data"


@pytest.mark.parametrize("text", [*NASTY, "<|endoftext|>a<|padding|>", "▁"])
def test_text_comes_back_unchanged_here_and_in_transformers(trained: Path, tmp_path: Path, text: str) -> None:
    tokenizer = load_text_tokenizer(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not {0, 1} & set(ids), "text must never turn into a control token"
    ids_of, said = write_tokenizer(trained, tmp_path, 400, 128)
    assert ids_of == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1} and "copied from" in said
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text


def end_with(config: DataConfig, token: str) -> None:
    """Name another end of documents beside the tokenizer."""
    path = Path(config.dir) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": token}))


def test_parts_with_two_ends_of_documents_are_not_joined(tmp_path: Path) -> None:
    for number in range(2):
        write_jsonl(tmp_path / f"{number}.jsonl", documents(100, seed=number))
    source = {"name": "main", "files": [str(tmp_path / "?.jsonl")]}
    config = config_of(tmp_path, tokenizer=TRAINED, sources=[source], part_bytes=1)
    train_tokenizer(config)
    prepare(config, 1, Task(0, 2, "a test"))
    end_with(config, "<|padding|>")
    changed = r"changed since: vocabulary \(\{.*'eos_id': 0\} -> \{.*'eos_id': 1\}\)"
    with pytest.raises(ValueError, match=rf"train/main was prepared from .*; {changed}"):
        prepare(config, 1, Task(1, 2, "a test"))
    for path in (Path(config.dir) / "train").rglob("*.json"):  # as the first manifests: what they say beside it decides
        content = json.loads(path.read_text())
        made_from = content["made_from"] if path.name == "manifest.json" else content
        made_from.pop("vocabulary", None)
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"train/main/part-0000. was prepared from .*; {changed}"):
        prepare(config, 1, Task(1, 2, "a test"))
    assert not (Path(config.dir) / "train/main/manifest.json").exists()


def test_sources_with_two_ends_of_documents_are_not_mixed(tmp_path: Path) -> None:
    config = prepared(tmp_path, tokenizer=TRAINED)
    write_jsonl(tmp_path / "more.jsonl", documents(100, seed=1))
    more = SourceConfig(name="more", files=[str(tmp_path / "more.jsonl")])
    end_with(config, "<|padding|>")
    prepare(config.model_copy(update={"sources": [more]}), 1)
    with pytest.raises(
        ValueError,
        match=r"train/main was prepared with the tokenizer's eos_id 0, but .*train/more with eos_id 1: the files",
    ):
        TrainingData(config.model_copy(update={"sources": [*config.sources, more]}))
    TrainingData(config)


def test_what_is_trained(trained: Path) -> None:
    tokenizer = load_text_tokenizer(trained)
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    assert tokenizer.vocab_size == 320 and tokenizer.prefix == [] and tokenizer.eos_id == 0
    assert pieces[:2] == ["<|endoftext|>", "<|padding|>"] and "▁the" in pieces
    assert not [piece for piece in pieces if sum(c.isdigit() for c in piece) > 1]
    assert json.loads((trained / "tokenizer.manifest.json").read_text())["text_bytes"] == {"main": 20_000}


def test_training_again_gives_the_same_bytes_with_any_number_of_threads(trained: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    (tmp_path / "run.yaml").write_text(
        json.dumps({"data": config_of(tmp_path, tokenizer=TRAINED).model_dump(mode="json")})
    )
    subprocess.run(
        [sys.executable, "-m", "data.tokenizer", str(tmp_path / "run.yaml")],
        cwd=ROOT, check=True, env=os.environ | {"RAYON_NUM_THREADS": "3", "TOKENIZERS_PARALLELISM": "true"},
    )  # fmt: skip
    assert contents(tmp_path / "data") == contents(trained)
    assert "exists already (320 tokens)" in train_tokenizer(config_of(tmp_path, tokenizer=TRAINED))


def test_other_settings_another_kind_and_leftovers_are_refused(trained: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    shutil.copytree(trained, tmp_path / "data")
    with pytest.raises(ValueError, match=r"trained with other settings .*train_bytes 20000 -> 30000"):
        train_tokenizer(config_of(tmp_path, tokenizer={**TRAINED, "train_bytes": 30_000}))
    with pytest.raises(ValueError, match=r"trained with other settings .*kind huggingface -> sentencepiece"):
        train_tokenizer(config_of(tmp_path, tokenizer={"vocab_size": 320, "train_bytes": 20_000}))
    with pytest.raises(
        ValueError, match=r"kind huggingface, but data\.tokenizer\.kind is sentencepiece; set it to hugg"
    ):
        prepare(config_of(tmp_path, tokenizer={"vocab_size": 320}), workers=1)
    for path in sorted((tmp_path / "data").iterdir()):
        if path.name != "tokenizer_config.json":
            path.unlink()
    train_tokenizer(config_of(tmp_path, tokenizer=TRAINED))  # as if it had been killed
    assert contents(tmp_path / "data") == contents(trained)
    (tmp_path / "data/tokenizer.json").unlink()
    (tmp_path / "data/generation_config.json").write_text('{"eos_token_id": 7}')
    for tokenizer in (TRAINED, {"vocab_size": 330}):
        with pytest.raises(
            ValueError, match=r"has no tokenizer, but files of one \(generation_config\.json.*\) .*; remove them"
        ):
            train_tokenizer(config_of(tmp_path, tokenizer=tokenizer))


def test_settings_that_do_not_suit(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(20))
    with pytest.raises(
        ValueError, match=r"vocab_size=30000 is too large for the text, which yields at most \d+ pieces; lower it"
    ):
        train_tokenizer(config_of(tmp_path, tokenizer={**TRAINED, "vocab_size": 30_000}))
    assert not (tmp_path / "data/tokenizer.json").exists()
    with pytest.raises(ValueError, match="model_type unigram is a SentencePiece type, but kind is huggingface"):
        config_of(tmp_path, tokenizer={**TRAINED, "model_type": "unigram"})


def take(folder: Path, source: Path, **changes: Any) -> str:
    return train_tokenizer(config_of(folder, tokenizer={"kind": "huggingface", "path": str(source), **changes}))


def test_a_folders_tokenizer_is_taken_with_what_lies_beside_it(tmp_path: Path) -> None:
    source = write_byte_level(tmp_path / "model")
    size = load_text_tokenizer(source).vocab_size
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors").write_bytes(b"weights stay")
    assert f"{size} tokens, taken from {source} as it is" in take(tmp_path, source, vocab_size=size)
    taken = contents(tmp_path / "data")
    assert taken == {name: content for name, content in contents(source).items() if name != "model.safetensors"}
    assert "already" in take(tmp_path, source, vocab_size=size)
    (tmp_path / "data/tokenizer.json").unlink()  # killed while copying: the file that decides comes last
    take(tmp_path, source, vocab_size=size)
    assert contents(tmp_path / "data") == taken
    config = config_of(tmp_path, tokenizer={"kind": "huggingface", "path": str(source), "vocab_size": size})
    write_jsonl(tmp_path / "raw.jsonl", documents(20))
    manifest = prepare(config, workers=1)[0][1]
    assert manifest.tokenizer_sha256 == tokenizer_sha256(source) and manifest.eos_id == 1
    other = write_byte_level(tmp_path / "other", begin=False)
    with pytest.raises(ValueError, match=r"holds a tokenizer that differs from data\.tokenizer\.path .*other"):
        prepare(config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": str(other)})}), 1)
    shutil.rmtree(source)
    prepare(config, workers=1)  # the copy is enough


def test_a_sentencepiece_model_is_taken_too(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "model")
    size = load_text_tokenizer(source).vocab_size
    assert "taken from" in take(tmp_path, source, vocab_size=size, kind="sentencepiece")
    assert contents(tmp_path / "data") == contents(source)


def test_what_cannot_be_taken(tmp_path: Path) -> None:
    source = write_byte_level(tmp_path / "model")
    size = load_text_tokenizer(source).vocab_size
    for path, sentence in (
        (tmp_path / "none", "does not exist; correct it"),
        (source / "tokenizer.json", f"is a file; give its folder, {source}$"),
        (tmp_path, "has no tokenizer: it holds neither"),
    ):
        with pytest.raises(ValueError, match=sentence):
            take(tmp_path, path, vocab_size=size)
    with pytest.raises(ValueError, match=rf"has {size} tokens, but data\.tokenizer\.vocab_size is 500; set it"):
        take(tmp_path, source, vocab_size=500)
    with pytest.raises(ValueError, match=r"of kind huggingface, but data\.tokenizer\.kind is sentencepiece"):
        take(tmp_path, source, vocab_size=size, kind="sentencepiece")
    assert not (tmp_path / "data").exists()
    write_sentencepiece(tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(ValueError, match=r"holds a tokenizer that differs from .*\(in tokenizer\.model"):
        take(tmp_path, source, vocab_size=size)
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("generation", [None, {"temperature": 0.5}, {"eos_token_id": []}], ids=str)
def test_an_end_token_that_only_the_models_config_names_comes_along(tmp_path: Path, generation: Any) -> None:
    source = write_byte_level(tmp_path / "model", config={"eos_token_id": [1, 5], "vocab_size": 400})
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    given = load_text_tokenizer(source)
    take(tmp_path, source, vocab_size=given.vocab_size)
    taken = load_text_tokenizer(tmp_path / "data")
    assert taken.eos_id == given.eos_id == 1 and not (tmp_path / "data/config.json").exists()
    found = json.loads((tmp_path / "data/generation_config.json").read_text())
    assert found == {**(generation or {}), "eos_token_id": [1, 5]}
    assert "already" in take(tmp_path, source, vocab_size=given.vocab_size)


def test_same_bytes_with_any_number_of_threads(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.one_part.BATCH_BYTES", 2000)
    config = prepared(tmp_path, documents(300), tokenizer=TRAINED)
    alone = contents(Path(config.dir))
    shutil.rmtree(tmp_path / "data/train")
    prepare(config, workers=3)
    assert contents(Path(config.dir)) == alone


def test_workers_are_the_threads_of_one_process(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And this process, which may fork later, has none."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "unchanged")
    monkeypatch.setattr(
        "data.prepare.encode._encode", os.getenv
    )  # pickled by name: the worker answers what it was told
    batch = [Document(b"a", False, Cursor(0, 1))]
    with Encoder(trained, workers=3) as encoder:
        for name, value in (("RAYON_NUM_THREADS", "3"), ("TOKENIZERS_PARALLELISM", "true")):
            encoder._folder = name
            assert [answer for _, answer in encoder.encode([batch])] == [value]
        assert encoder._pool is not None and len(encoder._pool._processes) == 1
    assert os.environ["TOKENIZERS_PARALLELISM"] == "unchanged"


def hard_text(seed: int, length: int) -> str:
    """Letters, digits, marks, spaces of several kinds and line breaks in any order, now and then words."""
    rng = random.Random(seed)
    characters = "abzÄßеж中あ0٣½ \t\u00a0\u2003\n\r.,'’!/-_\u0301\u200d🙂" + " " * 12 + "abcde" * 3
    pieces = ["'s", "'LL a", "<|chat|>", " <|chat|> b", "  x y", "\n\nA b", ".\n/a b", "1 a 2 b", "a a"]
    return "".join(rng.choice(pieces) if rng.random() < 0.1 else rng.choice(characters) for _ in range(length))


@pytest.mark.parametrize(
    "pattern", [None, *KNOWN_PATTERNS], ids=lambda pattern: f"{str(pattern)[:20]}-{len(str(pattern))}"
)
@pytest.mark.parametrize("digits", [True, False])
def test_parts_have_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch, pattern: str | None, digits: bool) -> None:
    """Cut at every border that there is, not only after thousands of characters."""
    monkeypatch.setattr("data.split_points.PART_CHARACTERS", 1)
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([hard_text(seed, 400) for seed in range(40)], trainer)
    tokenizer.add_special_tokens([AddedToken("<|chat|>", lstrip=True)])
    border = border_of(json.loads(tokenizer.to_str()))
    assert border is BEFORE_SPACE
    cuts = 0
    for seed in range(100, 150):
        text = hard_text(seed, 300)
        cut = list(parts(text, border))
        cuts += len(cut) - 1
        assert "".join(cut) == text
        assert [i for part in cut for i in tokenizer.encode(part).ids] == tokenizer.encode(text).ids
    assert cuts > 200


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, "a space before every part"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, "the same"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "no words"),
        ({"pre_tokenizer": None}, "no words"),
        ({"pre_tokenizer": {"type": "Digits"}}, "no words"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "not known"),
        ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False,
                            "pattern": {"Regex": r"a b|\S+|\s+"}}}, "a word with a space"),
        ({"model": {"type": "WordPiece"}}, "not known"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "no ids of its own"),
        ({"added_tokens": [{"single_word": False, "rstrip": True, "content": "a"}]}, "takes the space behind it"),
        ({"added_tokens": [{"single_word": True, "rstrip": False, "content": "a"}]}, "asks what is before it"),
        ({"added_tokens": [{"single_word": False, "rstrip": False, "content": "to be"}]}, "a token over the border"),
        ({"added_tokens": [{"single_word": False, "rstrip": False, "content": "to "}]}, "the border is in the token"),
    ],
    ids=str,
)  # fmt: skip
def test_other_tokenizers_are_not_cut(change: dict[str, Any], what: str) -> None:
    plain = {
        "normalizer": None,
        "model": {"type": "BPE", "dropout": None},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [],
    }
    assert border_of(plain) is BEFORE_SPACE
    assert border_of({**plain, **change}) is None, what


def test_a_given_tokenizer_may_have_fewer_tokens_than_a_trained_one(tmp_path: Path) -> None:
    given = Tokenizer(models.BPE())
    given.pre_tokenizer, given.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    given.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
    (tmp_path / "bytes").mkdir()
    given.save(str(tmp_path / "bytes/tokenizer.json"))
    (tmp_path / "bytes/tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    write_jsonl(tmp_path / "raw.jsonl", documents(20))
    small = {**TRAINED, "vocab_size": 257}
    with pytest.raises(
        ValueError, match=r"vocab_size=257 leaves no room .*; set it to 300 or more, or take a tokenizer"
    ):
        train_tokenizer(config_of(tmp_path, tokenizer=small))
    config = config_of(tmp_path, tokenizer={**small, "path": str(tmp_path / "bytes")})
    assert "257 tokens, taken from" in train_tokenizer(config)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (models.WordLevel({"A": 0, "<eos>": 1}, unk_token="[UNK]"), "WordLevel error: Missing"),
        (models.BPE({"A": 0, "<eos>": 1}, []), "it leaves it out"),
    ],
    ids=["fails", "drops"],
)
def test_a_tokenizer_without_tokens_for_all_text_is_refused(tmp_path: Path, model: Any, reason: str) -> None:
    made = Tokenizer(model)
    made.add_special_tokens(["<eos>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json cannot encode some texts, such as 'a' \({reason}.*; add tokens"
    ):
        load_text_tokenizer(tmp_path)


@pytest.mark.parametrize("texts", [["b"], ["a", "b"]], ids=["one", "several"])
def test_a_text_that_a_tokenizer_cannot_encode_is_told(tmp_path: Path, texts: list[str]) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode some texts, such as '[ab]' \(WordLevel error"):
        load_text_tokenizer(tmp_path).encode_documents(texts)


def test_a_long_document_goes_through_in_parts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(documents(1500))
    tokenizer = load_text_tokenizer(trained)
    whole = Tokenizer.from_file(str(trained / "tokenizer.json")).encode(text).ids
    longest = 0

    def encode(texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return type(tokenizer)._encode_parts(tokenizer, texts)

    monkeypatch.setattr(tokenizer, "_encode_parts", encode)
    assert tokenizer.encode(text) == whole
    ids, lengths = tokenizer.encode_documents(["", text, "a", ""])
    assert ids.tolist() == [*whole, 0, *tokenizer.encode("a"), 0] and lengths.tolist() == [0, len(whole) + 1, 2, 0]
    assert len(text) > 100_000 and longest < 33_000
    assert tokenizer.encode_documents([])[0].tolist() == tokenizer.encode_documents([""])[0].tolist() == []


def test_the_config_beside_a_trained_one_is_transformers_own(trained: Path) -> None:
    assert json.loads((trained / "tokenizer_config.json").read_text()) == BYTE_LEVEL_CONFIG
