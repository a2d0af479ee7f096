"""What is streamed is what generation gives, characters come out whole, and shares are those of the passes."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from data.detokenizer import Detokenizer
from data.tokenization import TextTokenizer, load_text_tokenizer
from evals.dial.file import Dial, Point, fingerprint
from evals.generate import Token, bar, main, shaded, show, stream, summary
from evals.scoring import layer_shares, open_model
from model.config import ModelConfig
from model.generate import generate
from tests.convert.exports import make, write_run
from tests.evals.tiny import POSITIONS, ROUTERS, SIZES, broken_weights, model, run_folder, weights_folder

PROMPT = [40, 41, 42, 43, 44]
TEXT = "naïve  “quotes”\n\t日本語 🙂🙂 é"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    return weights_folder(tmp_path_factory.mktemp("generate") / "weights", "layer", corpus)


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]
) -> TextTokenizer:
    """A tokenizer of either kind; both spell most of ``TEXT`` in bytes."""
    if request.param == "sentencepiece":
        return load_text_tokenizer(corpus["dir"])
    folder = tmp_path_factory.mktemp("byte-level")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["some plain text, twice: some plain text"], vocab_size=300, special_tokens=["</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return load_text_tokenizer(folder)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_stream_is_what_generation_gives(name: str) -> None:
    decoder = model(name)
    for temperature, top_p in ((0.0, 1.0), (0.9, 0.8)):
        one, other = (torch.Generator().manual_seed(5) for _ in range(2))
        whole = generate(decoder, torch.tensor([PROMPT]), 12, temperature, top_p, None, one)[0].tolist()
        tokens = list(stream(decoder, PROMPT, 12, temperature, top_p, None, other))
        assert PROMPT + [token.id for token in tokens] == whole
        # A token's share is that of the pass that chose it: over the token before it.
        executed = decoder(torch.tensor([whole[:-1]])).routing.executed[:, 0, len(PROMPT) - 1 :]
        assert [token.share for token in tokens] == pytest.approx(layer_shares(decoder.config, executed).tolist())
        ends = list(stream(decoder, PROMPT, 12, temperature, top_p, tokens[3].id, torch.Generator().manual_seed(5)))
        first = [token.id for token in tokens].index(tokens[3].id)
        assert ends == tokens[: first + 1]


def test_thresholds_are_passed_on() -> None:
    decoder = model("layer")
    tokens = list(stream(decoder, PROMPT, 6, thresholds=torch.full((4,), -torch.inf)))
    assert {token.share for token in tokens} == {1.0}
    assert {token.share for token in stream(decoder, PROMPT, 6, thresholds=torch.full((4,), torch.inf))} == {0.0}


def test_characters_come_out_whole(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT)
    for cut in (0, 1, 4):
        prompt = tokenizer.encode(TEXT[:cut])
        rest = tokenizer.encode(TEXT[cut:])
        detokenizer = Detokenizer(tokenizer, prompt)
        pieces = [detokenizer.add(token) for token in rest]
        assert "".join(pieces) + detokenizer.rest() == TEXT[cut:]
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", ["hello 🙂🙂🙂 b", "ab 中文文本 c", "日本語日本語日本語"])
def test_a_decoder_that_breaks_runs_of_bytes_gives_whole_characters(tmp_path: Path, text: str) -> None:
    """Hugging Face's ByteFallback makes all of a run no character if the run is not whole: what Llama 2 has."""
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "</s>": 257, " ": 258}
    pieces |= {letter: 259 + place for place, letter in enumerate("abchelo")}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    fallback = load_text_tokenizer(tmp_path)
    ids = fallback.encode(text)
    for cut in (0, 3):
        detokenizer = Detokenizer(fallback, ids[:cut])
        spelt = "".join(map(detokenizer.add, ids[cut:])) + detokenizer.rest()
        assert spelt == text[len(fallback.decode(ids[:cut]).rstrip("\ufffd")) :]


def test_what_is_no_character_comes_out_all_the_same(tokenizer: TextTokenizer) -> None:
    broken = tokenizer.encode("日")[-3:-1]  # two of its three bytes
    assert len(broken) == 2
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.add, broken)) == "" and set(detokenizer.rest()) == {"\ufffd"}
    detokenizer = Detokenizer(tokenizer)
    text = "".join(map(detokenizer.add, [*broken * 10, *tokenizer.encode(" end")]))
    assert text.startswith("\ufffd") and text.endswith(" end")  # nothing is held back forever


def test_how_tokens_are_shown(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a\né")
    tokens = [Token(token, place / (len(ids) - 1)) for place, token in enumerate(ids)]
    plain, coloured, bars = io.StringIO(), io.StringIO(), io.StringIO()
    assert show(iter(tokens), Detokenizer(tokenizer), 4, plain) == tokens
    assert plain.getvalue() == "a\né\n"
    show(iter(tokens), Detokenizer(tokenizer), 4, coloured, colour=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured.getvalue()) == "a\né\n" and "\x1b[38;5;231m" in coloured.getvalue()
    show(iter(tokens), Detokenizer(tokenizer), 4, bars, bars=True)
    lines = bars.getvalue().splitlines()
    assert len(lines) == len(ids) and lines[0].endswith("'a'") and lines[-1].startswith("    4 of 4 " + "█" * 20)
    assert bar(Token(1, 0.5), 8, "x") == "    4 of 8 " + "█" * 10 + "·" * 10 + " 'x'"
    show(iter(tokens[:-1]), Detokenizer(tokenizer), 4, bars, bars=True)
    assert "\ufffd" in bars.getvalue().splitlines()[-1]


def test_escape_sequences_do_not_act_on_a_terminal() -> None:
    assert shaded("\x1b[2Ja\nb", 0.0) == "\x1b[38;5;240m\ufffd[2Ja\x1b[0m\n\x1b[38;5;240mb\x1b[0m"


def test_the_summary() -> None:
    assert summary([], 8, 1.0) == "no new tokens"
    text = summary([Token(1, 0.25), Token(2, 0.75)], 8, 0.5)
    assert "2 tokens in 0.50 s, 4.0 tokens/s" in text and "mean 4.00 of 8 (50%), least 2, most 6" in text


def test_the_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "9", "--temperature", "0.7", "--top-p", "0.9", "--seed", "3"]
    assert main([str(weights), "--prompt", "def é", *options]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("def é") and "\x1b" not in said.out and "layers a token: mean" in said.err
    (tmp_path / "prompt.txt").write_text("def é", encoding="utf-8")
    main([str(weights), "--prompt-file", str(tmp_path / "prompt.txt"), *options])
    assert capsys.readouterr().out == said.out
    main([str(weights), "--prompt", "", *options, "--bars"])  # from a document's start
    assert " of 4 " in capsys.readouterr().out


def _dial(step: int) -> Dial:
    """Two points: as trained at 0.5, and everything."""
    point = {
        "density": 0.5, "trained": True, "thresholds": [0.0] * 4, "site_targets": [0.5] * 4,
        "calibration_density": 0.5, "held_out_density": 0.5, "held_out_site_densities": [0.5] * 4,
        "flops_per_token": 1.0, "dense_flops_per_token": 2.0, "loss": 1.0,
    }  # fmt: skip
    whole = {**point, "density": 1.0, "trained": False, "thresholds": [None] * 4, "site_targets": [1.0] * 4}
    config = ModelConfig.model_validate({**SIZES, "router": ROUTERS["layer"]})
    return Dial(
        model=fingerprint(config), step=step, validation_set="code", calibration_windows=1, held_out_windows=1,
        window_tokens=32, sites=config.sites, points=[Point(**point), Point(**whole)], lowest_margins=[-1.0] * 4,
    )  # fmt: skip


def test_a_tuned_model_has_no_dial(corpus: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "tuned", make("layer-ensemble"), corpus)
    refused = _refused(capsys, str(run), "--prompt", "def f", "--density", "0.5")
    assert f"only models of stage one have, and {run} was tuned; leave it out" in refused


def test_the_dial_of_a_run(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "one-run", tiny)
    (run / "dial").mkdir()
    options = ["--prompt", "def f", "--max-new-tokens", "5", "--density", "1"]
    assert f"calibrate one with python -m evals.dial {run}\n" in _refused(capsys, str(run), *options)
    (run / "dial/dial.json").write_text(_dial(7).model_dump_json())
    for path in (run, run / "checkpoints/step-00000007"):
        main([str(path), *options])
        told = capsys.readouterr().err
        assert "mean 4.00 of 4 (100%)" in told and told.endswith(
            "density 1 is a mean over validation text; these tokens differ\n"
        )
    (tmp_path / "other.json").write_text(_dial(8).model_dump_json())
    assert "step 8" in _refused(capsys, str(run), *options, "--dial", str(tmp_path / "other.json"))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--max-new-tokens", str(POSITIONS)], f"exceed the model's {POSITIONS} positions"),
        (["--temperature", "-1"], "--temperature must be 0 (greedy) or a positive number"),
        (["--temperature", "nan"], "--temperature must be 0 (greedy) or a positive number"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--dial", "x.json"], "give one with --density"),
        (["--seed", "-1"], "--seed must be from 0 to 2**63 - 1, got -1"),
        (["--seed", str(2**63)], f"--seed must be from 0 to 2**63 - 1, got {2**63}"),
    ],
)
def test_options_that_cannot_be(
    weights: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in _refused(capsys, str(weights), "--prompt", "x", *options)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_not_finite_give_no_token(
    weights: Path, corpus: dict[str, Any], tmp_path: Path, temperature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    token = open_model(weights).tokenizer.encode("return")[0]
    broken = broken_weights(tmp_path / "broken", "layer", corpus, token)
    error = _refused(capsys, str(broken), "--prompt", "return", "--max-new-tokens", "3", "--temperature", temperature)
    assert (
        "the model's logits are not finite (NaN or infinite), so there is no next token; run it with --dtype" in error
    )


def test_prompts_that_cannot_be(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    latin = _refused(capsys, str(weights), "--prompt-file", str(tmp_path / "latin.txt"))
    assert "latin.txt is not UTF-8 from its character 1 on" in latin
    assert "--prompt is not UTF-8 from its character 2 on" in _refused(capsys, str(weights), "--prompt", "a\udce9")
    whole = gzip.compress(b"return " * 99)
    for name, content in (("cut.gz", whole[:-9]), ("torn.gz", whole[:10] + b"\xff" * 9 + whole[19:]), ("no.gz", b"no")):
        (tmp_path / name).write_bytes(content)
        error = _refused(capsys, str(weights), "--prompt-file", str(tmp_path / name))
        assert f"{name} cannot be read: " in error and error.rstrip().endswith("; restore it")
    assert "none.txt" in _refused(capsys, str(weights), "--prompt-file", str(tmp_path / "none.txt"))
    assert str(tmp_path / "none") in _refused(capsys, str(tmp_path / "none"), "--prompt", "x")
