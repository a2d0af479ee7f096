"""The routing report counts what ran, says it in words, and lets nothing of a text become HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches import IGNORE_INDEX, Batch
from data.tokenization import TextTokenizer, load_text_tokenizer
from evals.routing import FEWEST
from evals.routing.__main__ import _name_of, _out, main
from evals.routing.page import Routing, RoutingReport, level, page, visible
from evals.routing.report import Observed, _texts, observe, report_on, summarise, votes_of
from evals.routing.windows import file_windows, own_windows, read_history
from model.config import EnsembleConfig, ModelConfig
from model.decoder import Decoder
from model.init import initialise
from tests.conftest import VOCAB
from tests.model.tiny import force
from trainer.checkpoints.weights_folder import write_weights
from trainer.config import PretrainConfig, WeightsConfig
from tune.config import TuneConfig
from tune.load import Loaded

LENGTH = 32
SIZES = {"vocab_size": VOCAB, "layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "ffn_width": 24, "init_std": 0.3}
NASTY = '<script>alert("1")</script> <b title=\'x\'>&amp;</b> \u202edlo "12 3.5"\n\tcaf\u00e9 \u2603 '


class Seen(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str] = []
        self.tokens: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [f"{name}={value}" for name, value in attrs]
        if tag not in ("meta", "rect", "path", "polyline"):
            self._open.append(tag)
        if tag == "i" and "title" in dict(attrs):
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag in ("rect", "path", "polyline") or self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "i" and self.tokens:
            self.tokens[-1] += data


@pytest.fixture(scope="module")
def tokenizer(corpus: dict[str, Any]) -> TextTokenizer:
    return load_text_tokenizer(corpus["dir"])


def _decoder(ensemble: bool = False, dense: bool = False, **router: Any) -> Decoder:
    config = ModelConfig.model_validate({**SIZES, "router": None if dense else {"density": 0.4, **router}})
    decoder = Decoder(config)
    initialise(decoder, config, 3)
    if ensemble:
        decoder.add_ensemble(EnsembleConfig(layers=2, final_weight=0.7))
    return decoder.eval()


def _run(folder: Path, corpus: dict[str, Any], decoder: Decoder, **changes: Any) -> Loaded:
    """A stage-one run's folder, as far as the report reads it, around ``decoder``."""
    checkpoint = folder / "run/checkpoints/step-00000020"
    checkpoint.mkdir(parents=True)
    block = {
        "model": decoder.config.model_dump(),
        "data": {**corpus, **changes},
        "train": {"run_dir": str(folder / "run"), "steps": 20, "global_batch_samples": 2, "micro_batch_samples": 2},
    }
    return Loaded(decoder, PretrainConfig.model_validate(block), 20, checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    """A folder of weights, with layer routers and an ensemble."""
    out = tmp_path_factory.mktemp("weights") / "model"
    write_weights(_decoder(ensemble=True), out, Path(corpus["dir"]), {"source": "a test"})
    return out


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "story.txt"
    path.write_text(NASTY * 6)
    return path


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Five windows of random tokens, each with an end of document."""
    tokens = torch.randint(4, VOCAB, (5, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens[:, 9] = 2
    return [Batch(row[None, :-1], row[None, 1:], torch.tensor([n]), None, None) for n, row in enumerate(tokens)]


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """Which of six module sites execute the tokens of a window, bool [6, 1, LENGTH]; the first executes none."""
    mask = torch.rand(6, 1, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0] = False
    return mask


@pytest.fixture(scope="module")
def forced(batches: list[Batch], mask: Tensor) -> tuple[Decoder, Observed]:
    decoder = force(_decoder(granularity="module"), mask)
    return decoder, observe(decoder, batches)


@pytest.fixture(scope="module")
def routing(forced: tuple[Decoder, Observed], tokenizer: TextTokenizer) -> Routing:
    found = summarise(forced[1], forced[0].config, tokenizer)
    assert found is not None
    return found


def test_every_chart_counts_what_ran(routing: Routing, mask: Tensor, batches: list[Batch]) -> None:
    shares = mask.float().mean((1, 2)).tolist()
    assert [bar.label for bar in routing.by_site] == ["attention-00", "ffn-00", "attention-01", "ffn-01",
                                                      "attention-02", "ffn-02"]  # fmt: skip
    assert [bar.share for bar in routing.by_site] == pytest.approx(shares) and shares[0] == 0
    assert routing.mean == pytest.approx(sum(shares) / 6) and routing.unit == "modules"
    for bars in (routing.by_position, routing.by_class, routing.by_frequency):
        assert sum(bar.tokens for bar in bars) == 5 * LENGTH
        assert sum(bar.tokens * bar.share for bar in bars) / (5 * LENGTH) == pytest.approx(routing.mean)
    pairs = mask[:, 0].float().mean(0).view(16, 2).mean(1)
    assert [bar.share for bar in routing.by_position] == pytest.approx(pairs.tolist())
    assert [bar.label for bar in routing.by_position[:2]] == ["0 to 1", "2 to 3"]
    ends = next(bar for bar in routing.by_class if bar.label == "end")
    assert ends.tokens == 5 and ends.share == pytest.approx(float(mask[:, 0, 9].float().mean()))
    counts = torch.cat([batch.tokens for batch in batches]).unique(return_counts=True)[1]
    assert routing.by_frequency[0].label == "once" and routing.by_frequency[0].tokens == int((counts == 1).sum())


def test_the_most_and_the_least_executed(forced: tuple[Decoder, Observed], tokenizer: TextTokenizer) -> None:
    decoder, seen = forced
    tokens = torch.full_like(seen.tokens, 50)
    tokens[::4], tokens[1:17:4] = 60, 70  # 70 four times only: too seldom to speak of
    executed = torch.zeros_like(seen.executed)
    executed[:, ::4] = True
    changed = Observed(tokens, seen.predicted, seen.places, seen.windows, executed, None, seen.tally)
    found = summarise(changed, decoder.config, tokenizer)
    assert found is not None and len(found.most) == 2
    assert [(bar.share, bar.tokens) for bar in found.most] == [(1.0, 40), (0.0, 116)]
    assert found.least == found.most[::-1]
    assert [bar.label for bar in found.by_frequency] == ["4 times", "40 times", "116 times"]


def test_the_text_says_which_sites_ran(routing: Routing, mask: Tensor, forced: tuple[Decoder, Observed]) -> None:
    shown = [token for _, tokens in routing.text for token in tokens]
    assert [heading for heading, _ in routing.text] == [f"Window {n}" for n in range(1, 6)]
    assert [token.used for token in shown] == mask[:, 0].sum(0).tolist() * 5
    first = mask[:, 0, 0].nonzero().flatten().tolist()
    layers = [[site // 2 for site in first if site % 2 == kind] for kind in (0, 1)]
    for kind, ran in zip(("attention", "ffn"), layers, strict=True):
        assert (f"{kind} {ran[0]}" in shown[0].where) if ran else kind not in shown[0].where
    assert [token.ends for token in shown[:LENGTH]] == [place == 9 for place in range(LENGTH)]


def test_votes_by_the_class_of_the_predicted_token(batches: list[Batch], tokenizer: TextTokenizer) -> None:
    decoder = _decoder(ensemble=True)
    assert decoder.ensemble is not None
    with torch.no_grad():
        decoder.ensemble.router.weight.normal_(0, 2, generator=torch.Generator().manual_seed(2))
    targets = batches[0].targets.clone()
    targets[0, :4] = IGNORE_INDEX
    seen = observe(decoder, [Batch(batches[0].tokens, targets, torch.tensor([0]), None, None), *batches[1:]])
    votes = votes_of(seen, decoder.config, tokenizer)
    assert votes is not None and seen.weights is not None
    assert votes.layers == ["layer-01", "layer-02"] and votes.classes[-1] == "all"
    assert votes.tokens[-1] == 5 * LENGTH - 4 == sum(votes.tokens[:-1])
    assert all(sum(row) == pytest.approx(1) for row in votes.weights)
    ends = seen.predicted == 2
    assert votes.tokens[votes.classes.index("end")] == int(ends.sum()) == 5
    assert votes.weights[votes.classes.index("end")] == pytest.approx(seen.weights[ends].mean(0).tolist())
    tallied = [weight / seen.tally.targets for weight in seen.tally.vote_weights]
    assert votes.weights[-1] == pytest.approx(tallied, rel=1e-5)
    assert votes_of(observe(_decoder(), batches), decoder.config, tokenizer) is None


def test_the_command_writes_a_page_by_itself(
    folder: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main([str(folder), str(story), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed and "Target density: 0.400" in printed
    html = out.read_text()
    seen = Seen(html)
    assert "script" not in seen.tags and "link" not in seen.tags and "img" not in seen.tags
    assert not re.search(r"(src|href|url\(|@import|https?:)", html)
    assert not [value for value in seen.values if value.startswith("on")]
    assert "How the last layers vote" in html and "Densities over training" not in html
    assert len(html) < 300_000 and list(tmp_path.iterdir()) == [out]


def test_where_a_report_lies_unless_said(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    assert _out(tmp_path / "run", None) == tmp_path / "run/routing.html"
    assert _out(checkpoint, None).resolve() == (tmp_path / "run/routing.html").resolve()
    assert [_name_of(path) for path in (tmp_path / "run", checkpoint)] == ["run", "run, step-00000004"]


def test_nothing_of_a_text_becomes_html(folder: Path, story: Path, tmp_path: Path) -> None:
    evil = tmp_path / "<img src=x onerror=alert(1)>.txt"
    evil.write_bytes(story.read_bytes())
    main([str(folder), str(evil), "--out", str(tmp_path / "report.html")])
    html = (tmp_path / "report.html").read_text()
    seen = Seen(html)
    assert not {"script", "img"} & set(seen.tags) and "<img" not in html and "<b title" not in html
    shown = "".join(seen.tokens)
    assert "<script>alert(\"1\")</script> <b title='x'>&amp;</b> " in shown  # the text as it was, readable
    assert "\u202e" not in html and "↵\n⇥\tcaf" in shown and shown.rstrip("\n").endswith("∎")
    assert "<U+202E>··dlo" in shown and "caf\u00e9· \u2603··" in shown  # spelt in bytes
    assert any(value.startswith("title=<0x") for value in seen.values)


def test_characters_that_are_spelt_in_bytes() -> None:
    pieces = ["<0xE2>", "a", "<0xE2>", "<0x98>", "<0x83>", "<0xC3>", "<0xA9>", "<0x26>", "<0x41>", "<0xF0>", "<0x9F>"]
    assert _texts(pieces) == ["<0xE2>", "a", "\u2603", "·", "·", "\u00e9", "·", *pieces[7:]]
    assert _texts(["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]) == ["\U0001f600", "·", "·", "·"] and _texts([]) == []


def test_visible() -> None:
    assert visible("▁a\n\t\r") == " a↵\n⇥\t␍"
    assert [visible(f"<0x{byte}>") for byte in ("26", "0A", "00", "E2")] == ["&", "↵\n", "<U+0000>", "<0xE2>"]
    assert visible("\u202e\x00\u200d\u2028") == "<U+202E><U+0000>\u200d<U+2028>"
    assert [level(share) for share in (0, 0.05, 0.5, 1.0)] == [0, 0, 4, 8]


def _metrics(path: Path, sites: list[str]) -> None:
    lines: list[Any] = [{"step": 0, "validation/code/density": 0.5}]
    for step in (10, 20, 20, 30):
        lines.append({"step": step, "budget/target": 0.4, **{f"density/{site}": step / 100 for site in sites}})
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 40, "den')


def test_densities_over_training(tmp_path: Path, corpus: dict[str, Any]) -> None:
    decoder = _decoder(always_on_first=1)
    loaded = _run(tmp_path, corpus, decoder)
    metrics, sites = tmp_path / "run/metrics.jsonl", decoder.config.sites
    assert read_history(metrics, sites, 0.4, 99) is None
    _metrics(metrics, sites)
    history = read_history(metrics, sites, 0.4, 99)
    assert history is not None and history.steps == [10, 20, 30] and history.targets == [0.4] * 3
    assert history.densities == [[0.1, 0.2, 0.3]] * 2
    assert read_history(metrics, sites, 0.4, 10) is None and read_history(metrics, [], 0.4, 99) is None
    report = report_on(loaded, [], 128, "a run")
    assert report.routing is not None and report.routing.history is not None
    assert report.routing.history.steps == [10, 20]  # up to the checkpoint's
    html = page(report)
    assert "Training leaves out" in html
    assert "Densities over training" in html and "1 of the layers have no router" in html
    assert "validation set code: 128 tokens in 4 windows" in html and Seen(html).tags.count("polyline") == 4


def test_a_dense_model_with_an_ensemble_shows_its_vote(tmp_path: Path, corpus: dict[str, Any]) -> None:
    loaded = _run(tmp_path, corpus, _decoder(ensemble=True, dense=True))
    report: RoutingReport = report_on(loaded, [], 128, "dense")
    assert report.routing is None and report.votes is not None
    html = page(report)
    assert "This model has no routers: every token runs every layer" in html and "How the last layers vote" in html
    assert "token by token" not in html


@pytest.mark.parametrize("kind", ["random", "stride", "expert_choice"])
def test_other_routers_are_told_apart(tmp_path: Path, corpus: dict[str, Any], kind: str) -> None:
    report = report_on(_run(tmp_path, corpus, _decoder(kind=kind)), [], 96, kind)
    html = page(report)
    assert (
        "learned switch" not in html and "Training leaves out" not in html and f"<td>{kind}, on 3 layers</td>" in html
    )


def test_windows_of_files(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    plain, lines = tmp_path / "code.txt", tmp_path / "lines.jsonl"
    plain.write_text("import sys\n" * 40)
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one two", "", "three")))
    windows = file_windows([plain, lines], tokenizer, 16, 80)
    rows = [(batch.tokens[0].tolist(), batch.targets[0].tolist()) for batch in windows]
    assert [len(tokens) for tokens, _ in rows[:3]] == [16, 16, 8]  # half of the 80
    assert [token for tokens, _ in rows[:3] for token in tokens] == tokenizer.encode(plain.read_text())[:40]
    assert all(targets[:-1] == tokens[1:] for tokens, targets in rows)
    assert rows[2][1][-1] == tokenizer.encode(plain.read_text())[40]
    assert rows[3][0] == [*tokenizer.encode("one two"), tokenizer.eos_id] and rows[3][1][-1] == IGNORE_INDEX
    assert rows[-1][0] == [*tokenizer.encode("three"), tokenizer.eos_id]
    assert [int(batch.sample_ids) for batch in windows] == list(range(len(windows)))


def test_windows_of_a_tuning_run(tokenizer: TextTokenizer, corpus: dict[str, Any], tmp_path: Path) -> None:
    examples = tmp_path / "held.jsonl"
    examples.write_text("".join(json.dumps({"prompt": f"say {n}:", "response": f" {n}"}) + "\n" for n in range(30)))
    source = {"name": "numbers", "files": [str(examples)]}
    data = {"sequence_tokens": 64, "sources": [source], "validation": [source], "tokenizer": corpus["dir"]}
    train = {"run_dir": str(tmp_path / "run"), "steps": 1, "global_batch_samples": 1, "micro_batch_samples": 1}
    blocks = {"base": {"path": "x"}, "model": {**SIZES, "router": {"density": 0.4}}, "data": data, "train": train}
    config = TuneConfig.model_validate(blocks)
    what, windows = own_windows(config, tokenizer, 100)
    assert what.startswith("validation set numbers") and 5 < len(windows) < 30
    prompt, response = tokenizer.segments(["say 0:", " 0"])
    assert windows[0].tokens[0].tolist() == [*prompt, *response]
    assert windows[0].targets[0].tolist() == [*[IGNORE_INDEX] * (len(prompt) - 1), *response, tokenizer.eos_id]
    loaded = Loaded(_decoder(ensemble=True), config, 1, tmp_path)
    report = report_on(loaded, [], 100, "tuned")
    assert report.votes is not None and report.votes.tokens[-1] == int(sum((b.targets >= 0).sum() for b in windows))
    with pytest.raises(ValueError, match=r"has no data.validation, so there is nothing to read; give text files"):
        own_windows(config.model_copy(update={"data": config.data.model_copy(update={"validation": []})}), tokenizer, 9)


def test_a_dense_model_has_nothing_to_show(tmp_path: Path) -> None:
    decoder = _decoder(dense=True)
    loaded = Loaded(decoder, WeightsConfig(model=decoder.config), None, tmp_path)
    with pytest.raises(ValueError, match=r"is a dense model without an ensemble: every token runs every layer, so the"):
        report_on(loaded, [], 128, "dense")


def test_a_tokenizer_of_another_model() -> None:
    tokens = torch.full((1, FEWEST), VOCAB)
    with pytest.raises(ValueError, match=rf"the tokenizer gives the token {VOCAB}, the model has {VOCAB}; the two do"):
        observe(_decoder(), [Batch(tokens, tokens, torch.tensor([0]), None, None)])


def test_what_the_command_refuses(
    folder: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("a word")
    (tmp_path / "broken.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "folder.html").mkdir()
    out = ["--out", str(tmp_path / "report.html")]
    model, text = str(folder), str(story)
    cases: list[tuple[list[str], str]] = [
        ([str(tmp_path / "none"), *out], f"there is no folder {tmp_path / 'none'}; give a run, a checkpoint or"),
        ([str(tmp_path), *out], "is neither a run folder nor a whole checkpoint"),
        ([model, *out], "is a folder of weights, without a validation set; give text files"),
        ([model, text], f"{folder} is not in a run folder; say with --out where to write"),
        ([model, str(tmp_path / "no.txt"), *out], f"no file matches '{tmp_path / 'no.txt'}'; correct"),
        ([model, str(empty), *out], f"the text has 0 tokens, but a meaningful report needs at least {FEWEST};"),
        ([model, str(short), *out], "tokens, but a meaningful report needs at least 64; give longer files"),
        ([model, str(tmp_path / "broken.jsonl"), *out], "broken.jsonl cannot be read: document 0: field 'text' must"),
        ([model, text, "--tokens", "3", *out], "--tokens must be at least 64 for a meaningful report, got 3; raise it"),
        (
            [model, text, "--out", str(tmp_path / "no/report.html")],
            "to write report.html in; create it, or give another",
        ),
        ([model, text, "--out", str(tmp_path / "model.safetensors")], "--out must end in .html, got "),
        (
            [model, text, "--out", str(tmp_path / "folder.html")],
            "folder.html is a folder; give the name of a file in it",
        ),
    ]
    for arguments, sentence in cases:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 1
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()
