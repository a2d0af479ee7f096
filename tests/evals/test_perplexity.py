"""Every token is scored once, with the context that was promised, and what ran for it is counted."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.sentencepiece_file import load_tokenizer, model_proto
from evals.perplexity import main, perplexity, trained_tokens
from evals.scoring import layer_shares, open_model, windows
from evals.texts import texts_of
from model.config import ModelConfig
from tests.evals.tiny import POSITIONS, SIZES, broken_weights, run_folder, weights_folder
from tests.launching import run

TEXTS = ["def add(a, b):\n    return a + b\n" * 6, "x = 'naïve'  # ünïcode\n", "import os\n"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    return weights_folder(tmp_path_factory.mktemp("perplexity") / "weights", "layer", corpus)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents, and one without text."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]).encode()))
    return path


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 29])
def test_each_token_is_scored_once_with_its_context(count: int, stride: int) -> None:
    tokens, window = list(range(100, 100 + count)), 8
    rows = list(windows([5, 6], tokens, window, stride))
    assert [token for row in rows for token in row.targets] == tokens
    for row in rows:
        assert len(row.inputs) <= window and len(row.targets) <= len(row.inputs)
        assert len(row.targets) <= stride or row is rows[0]
        followed = [*row.inputs[1:], row.targets[-1]]  # each scored token comes right after an input
        assert followed[-len(row.targets) :] == row.targets
        context = len(row.inputs) - len(row.targets) + 1  # of the first scored token
        assert row.inputs[0] == 6 or context >= window - stride
        assert row.inputs == [6, *tokens][: len(row.inputs)] or row.inputs[0] >= 100


def test_two_ranks_have_the_result_of_one(weights: Path, jsonl: Path, tmp_path: Path) -> None:
    options = [str(weights), str(jsonl), "--window", "16", "--stride", "8", "--batch-tokens", "40"]
    assert main([*options, "--json", str(tmp_path / "one.json")]) == 0
    ended = run("evals.perplexity", *options, "--json", str(tmp_path / "two.json"), processes=2)
    assert ended.returncode == 0 and ended.stdout.count("wrote ") == 1, ended.stdout[-3000:]
    (one,), (two,) = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-6) and two["flops"] == one["flops"]


def test_share_of_layers() -> None:
    executed = torch.tensor([[True, False, True]] * 3 + [[True, False, False]] * 3)
    router = {"density": 0.5, "granularity": "module", "always_on_last": 1}
    config = ModelConfig.model_validate({**SIZES, "router": router})
    assert layer_shares(config, executed).tolist() == [1.0, 0.25, 0.625]
    assert layer_shares(config.model_copy(update={"router": None}), executed[:0]).tolist() == [1.0] * 3


def test_the_text_field_is_that_of_the_runs_own_data(
    tiny: dict[str, Any], tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (*tiny["data"]["sources"], *tiny["data"]["validation"]):
        source["text_field"] = "body"
    run, file, out = run_folder(tmp_path / "run", tiny), tmp_path / "a.jsonl", tmp_path / "out.json"
    file.write_text(json.dumps({"body": TEXTS[0], "text": TEXTS[0] + TEXTS[1]}) + "\n")
    assert main([str(run), str(file), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["results"][0]["bytes"] == len(TEXTS[0].encode())
    assert main([str(run), str(file), "--json", str(out), "--text-field", "text"]) == 0
    assert json.loads(out.read_text())["results"][0]["bytes"] == len((TEXTS[0] + TEXTS[1]).encode())
    capsys.readouterr()
    error = _refused(capsys, str(weights), str(file), "--text-field", "titel")
    assert "line 1 has no field 'titel' (found: body, text); name the one with the text" in error
    assert "--text-field on a command line" in error


def test_a_missing_file_is_told_before_the_model_is_read(
    tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _refused(capsys, str(tmp_path / "no-model"), str(jsonl), str(tmp_path / "gone.txt"))
    assert f"no file matches '{tmp_path / 'gone.txt'}'; correct the name or pattern" in error


def test_the_command_on_several_files(
    weights: Path, jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    files = [str(jsonl), str(tmp_path / "one.txt.gz")]
    out = tmp_path / "out.json"
    options = ["--window", "16", "--stride", "4", "--batch-tokens", "48", "--json", str(out)]
    assert main([str(weights), *files, *options]) == 0
    printed = capsys.readouterr().out
    first, second, both = json.loads(out.read_text())["results"]
    assert [first["documents"], second["documents"], both["documents"]] == [3, 1, 4]
    assert first["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert both["nll"] == first["nll"] + second["nll"] and both["flops"] == first["flops"] + second["flops"]
    assert first["bits_per_byte"] == pytest.approx(first["nll"] / math.log(2) / first["bytes"])
    assert first["perplexity"] == pytest.approx(math.exp(first["nll"] / first["tokens"]))
    assert 0 < both["flops_share"] < 1
    assert f"{both['bits_per_byte']:.4f}" in printed and "  all\n" in printed and str(out) in printed


def test_more_context_changes_the_score_and_batches_do_not(weights: Path, jsonl: Path) -> None:
    opened = open_model(weights)
    one, other, many = (
        perplexity(opened, texts_of(str(jsonl)), "x", 16, stride, tokens)
        for stride, tokens in ((16, 16), (4, 16), (16, 80))
    )
    assert one.nll == pytest.approx(many.nll, rel=1e-6) and one.flops == many.flops
    assert one.nll != pytest.approx(other.nll, rel=1e-3) and other.flops > one.flops
    assert one.tokens == other.tokens == many.tokens


def test_windows_of_the_training_by_default(tiny: dict[str, Any], tmp_path: Path, weights: Path) -> None:
    assert trained_tokens(open_model(run_folder(tmp_path / "one-run", tiny))) == 32
    assert trained_tokens(open_model(weights)) == POSITIONS


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--window", "65"], "--window must be 1 to 64"),
        (["--window", "0"], "--window must be 1 to 64"),
        (["--window", "8", "--stride", "9"], "--stride must be 1 to the window's 8 tokens"),
        (["--stride", "0"], "--stride must be 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--text-field", "body"], "has no field 'body'"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--json", "/"], "--json / is a folder; give the name of a file in it"),
    ],
)
def test_options_that_cannot_be(
    weights: Path, jsonl: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in _refused(capsys, str(weights), str(jsonl), *options)


def test_files_that_cannot_be(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no file matches" in _refused(capsys, str(weights), str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    assert "document 1 is not valid Unicode" in _refused(capsys, str(weights), str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "good.txt").write_text("import os")
    (tmp_path / "late.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    for name, told in (("empty.txt", "holds no text"), ("late.jsonl", "must hold text"), ("latin.txt", "is not valid")):
        with pytest.raises(SystemExit):  # before the first file is scored
            main([str(weights), str(tmp_path / "good.txt"), str(tmp_path / name)])
        printed = capsys.readouterr()
        assert told in printed.err and "good.txt" not in printed.out
    (tmp_path / "x.bin").write_bytes(b"x")
    for model in (weights, tmp_path):  # whatever the model is: it is not looked at
        assert "x.bin cannot be inferred from its name (known endings: .txt" in _refused(
            capsys, str(model), str(tmp_path / "x.bin")
        )
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode())[:-9])
    assert "torn.txt.gz" in _refused(capsys, str(weights), str(tmp_path / "torn.txt.gz"))


def test_logits_that_are_not_finite_are_no_score(
    weights: Path, corpus: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = open_model(weights).tokenizer.encode("import os")[-1]
    broken, texts = broken_weights(tmp_path / "broken", "layer", corpus, token), tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("x", "", "import os as x")))
    error = _refused(capsys, str(broken), str(texts))
    assert f"{texts}, document 3: the model's logits are not finite (NaN or infinite)" in error and "--dtype" in error


def test_a_tokenizer_that_was_changed_in_place_is_not_the_models(
    tiny: dict[str, Any], tmp_path: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(tiny["data"]["dir"], tmp_path / "data")
    tiny["data"]["dir"] = str(data)
    run = run_folder(tmp_path / "run", tiny)
    proto = model_proto(load_tokenizer(data))
    proto.pieces[-1].score -= 1.0
    (data / "tokenizer.model").write_bytes(proto.SerializeToString())
    error = _refused(capsys, str(run), str(jsonl))
    assert f"{data}/train/code/manifest.json: the shards were made with tokenizer " in error
    for kind in ("train", "validation"):  # where there are no shards, it is taken
        shutil.rmtree(data / kind)
    assert main([str(run), str(jsonl)]) == 0


def test_models_that_cannot_be(
    weights: Path, jsonl: Path, tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(tmp_path / "none") in _refused(capsys, str(tmp_path / "none"), str(jsonl))
    small = weights_folder(tmp_path / "small", "layer", corpus, vocab_size=399)
    assert "has 400 pieces" in _refused(capsys, str(small), str(jsonl))
    choice = {"density": 0.5, "kind": "expert_choice"}
    looking_ahead = weights_folder(tmp_path / "choice", "layer", corpus, router=choice)
    assert "expert_choice" in _refused(capsys, str(looking_ahead), str(jsonl))
    torn = Path(shutil.copytree(weights, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes(b"")
    assert "not a complete folder" in _refused(capsys, str(torn), str(jsonl))
