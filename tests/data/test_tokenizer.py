"""Training the tokenizer: settings, repeatability, refusals."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import yaml

from data.sentencepiece_file import load_tokenizer
from data.sources import Source
from data.split_points import PART_CHARACTERS
from data.tokenization import load_text_tokenizer, tokenizer_sha256
from data.tokenizer import _spread_documents, main, train_tokenizer
from settings.user_errors import is_users
from tests.data.helpers import config_of, documents, write_jsonl

NASTY = [
    " ",
    "  two  spaces  ",
    "\n\n\n",
    "\t\ttabs\tand\r\nreturns\r",
    "def f(x):\n    return x  # trailing  \n\n",
    "e\u0301 and \u00e9, \ufb01 ligature, \u2460, \uff21",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4",
    "\ufeffbom, nul \x00, bell \x07, \u2028 and \u00a0",
    "<s> </s> <unk> <pad> <0x41>",
    "3.14159 1,000,000 007",
    "日本語 العربية עברית ไทย",
    "a" * 3000,
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_jsonl(folder / "raw.jsonl", documents(200))
    train_tokenizer(config_of(folder, tokenizer={"vocab_size": 320, "model_type": request.param}))
    return folder / "data"


@pytest.mark.parametrize("text", NASTY)
def test_text_comes_back_unchanged(trained: Path, text: str) -> None:
    tokenizer = load_tokenizer(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids), "text must never turn into a control token"


def test_fixed_ids(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, 3)
    assert tokenizer.vocab_size() == 320
    assert tokenizer.encode("\n\n") == [tokenizer.piece_to_id("\n")] * 2


def test_digits_are_split(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 and not p.startswith("<0x")]


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "raw.jsonl", documents(200))
        config = config_of(tmp_path / name, tokenizer={"vocab_size": 320, "model_type": "unigram"})
        train_tokenizer(config)
        hashes.append(tokenizer_sha256(config.dir))
    assert hashes[0] == hashes[1]


def test_sample_follows_weights_and_reaches_every_file(tmp_path: Path) -> None:
    for number in range(4):
        write_jsonl(tmp_path / f"a{number}.jsonl", documents(200, seed=number))
    write_jsonl(tmp_path / "b.jsonl", documents(400, seed=9))
    (tmp_path / "small.txt").write_text("\u0416" * 200)
    sources = [
        {"name": "a", "files": [str(tmp_path / "a*.jsonl"), str(tmp_path / "small.txt")], "weight": 3},
        {"name": "b", "files": [str(tmp_path / "b.jsonl")], "weight": 1},
    ]
    config = config_of(tmp_path, sources=sources, tokenizer={"vocab_size": 320, "train_bytes": 40_000})
    said = train_tokenizer(config)
    assert "a 30,000, b 10,000" in said
    assert load_tokenizer(config.dir).piece_to_id("\u0416") != 0, "the smallest file was not read"


def test_long_documents_give_the_same_ids_in_parts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    config = config_of(tmp_path)
    train_tokenizer(config)
    tokenizer = load_tokenizer(config.dir)
    text = "".join(documents(1500))
    assert len(text) > 3 * PART_CHARACTERS
    ours = load_text_tokenizer(config.dir)
    assert ours.encode(text) == tokenizer.encode(text)
    unbroken = "word " * PART_CHARACTERS
    assert tokenizer.decode(ours.encode(unbroken)) == unbroken


def test_existing_tokenizer_is_kept_or_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    train_tokenizer(config_of(tmp_path))
    before = tokenizer_sha256(tmp_path / "data")
    assert "nothing to do" in train_tokenizer(config_of(tmp_path))
    other = config_of(tmp_path, tokenizer={"vocab_size": 330, "train_bytes": 20_000})
    with pytest.raises(ValueError, match="vocab_size 320 -> 330"):
        train_tokenizer(other)
    manifest = tmp_path / "data" / "tokenizer.manifest.json"
    manifest.unlink()  # as if brought from elsewhere: its size still counts
    assert "nothing to do" in train_tokenizer(config_of(tmp_path))
    with pytest.raises(ValueError, match=r"has 320 tokens, but data\.tokenizer\.vocab_size is 330; set it"):
        train_tokenizer(other)
    manifest.write_text('{"sha256": "0", "settings": {}}')
    with pytest.raises(ValueError, match="is not the file that"):
        train_tokenizer(config_of(tmp_path))
    assert tokenizer_sha256(tmp_path / "data") == before


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_vocabulary_that_does_not_suit_the_text(tmp_path: Path, model_type: str) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(20))
    config = config_of(tmp_path, tokenizer={"vocab_size": 30_000, "model_type": model_type})
    with pytest.raises(
        ValueError, match=r"vocab_size=30000 is too large for the text, which yields at most \d+ pieces; lower it"
    ):
        train_tokenizer(config)
    assert not (tmp_path / "data" / "tokenizer.model").exists()


def test_many_characters_in_a_small_vocabulary(tmp_path: Path) -> None:
    """SentencePiece's own advice names an option that does not exist here."""
    write_jsonl(tmp_path / "raw.jsonl", ["".join(chr(0x4E00 + n) for n in range(3000)) * 3])
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size=320 is too small: .* take 3\d{3} pieces; set it higher") as told:
        train_tokenizer(config)
    assert "coverage" not in str(told.value)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": ""}\n', "source 'other' holds no text to train the tokenizer on; check its files"),
        ('{"text": "cut of', r"source 'other': cannot read .*other\.jsonl: line 1 is not JSON"),
        ('{"body": "x"}\n', r"source 'other': cannot read .*other\.jsonl: line 1 has no field 'text'"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, kind: str, content: str, said: str) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    (tmp_path / "other.jsonl").write_text(content)
    sources = [{"name": name, "files": [str(tmp_path / f"{file}.jsonl")]} for name, file in SOURCES.items()]
    tokenizer = {"kind": kind, "vocab_size": 320, "train_bytes": 20_000}
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        train_tokenizer(config_of(tmp_path, sources=sources, tokenizer=tokenizer))
    assert is_users(caught.value)


def test_all_files_of_a_hub_dataset_are_read_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    for number, letter in enumerate("ДЖЮ"):
        write_jsonl(tmp_path / "set" / f"train-{number}.jsonl", [f"{letter * 50} word"] * 300)
    sources, size = [{"name": "hub", "hub": str(tmp_path / "set")}], {"vocab_size": 300, "train_bytes": 20_000}
    said = train_tokenizer(config_of(tmp_path, sources=sources, tokenizer=size))
    assert "trained on 20,000 bytes (hub 20,000)" in said
    tokenizer = load_tokenizer(tmp_path / "data")
    assert all(tokenizer.piece_to_id(letter) != tokenizer.unk_id() for letter in "ДЖЮ")
    monkeypatch.setattr("data.tokenizer._HUB_FILES", 2)
    texts = _spread_documents(Source(config_of(tmp_path, sources=sources).sources[0]), 1000)
    assert {text.decode()[0] for text in texts} == {"Д", "Ю"}


def test_a_source_of_next_to_no_weight_gives_a_byte(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    sources = [{"name": n, "files": [str(tmp_path / "raw.jsonl")], "weight": w} for n, w in (("a", 1), ("b", 1e-9))]
    assert "(a 19,999, b 1)" in train_tokenizer(config_of(tmp_path, sources=sources))


SOURCES = {"main": "raw", "other": "other"}


def test_ctrl_c_while_texts_are_read_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Iterator[bytes]:
        yield b"some text"
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": config_of(tmp_path).model_dump(mode="json")}))
    monkeypatch.setattr("data.tokenizer._spread_documents", interrupted)
    monkeypatch.setattr("sys.argv", ["data.tokenizer", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_missing_or_damaged_tokenizer_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.model does not exist"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer: it holds neither tokenizer\.json nor tokenizer\.model"):
        tokenizer_sha256(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_an_end_piece_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(200)), model_writer=model, vocab_size=50, eos_id=-1, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=r"tokenizer\.model has no end-of-sentence piece"):
        load_tokenizer(tmp_path)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data:\n  dir: {tmp_path}/data\n  sequence_tokens: 16\n"
        f"  sources: [{{name: a, files: ['{tmp_path}/raw.jsonl']}}]\n"
    )
    arguments = ["data.tokenizer", str(config), "data.tokenizer.train_bytes=20000"]
    monkeypatch.setattr("sys.argv", [*arguments, "data.tokenizer.vocab_size=320"])
    main()
    assert "320 tokens" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments, "data.tokenizer.vocab_size=330"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
