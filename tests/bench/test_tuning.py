"""The comparison of tuning methods at toy size: every run once, a row a method, what fails is reported."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from bench.tuning import tables
from bench.tuning.__main__ import main
from bench.tuning.runs import CHOICES, SPLITS, Outcome, Runs, TuningRun, outcome
from tests.bench.commands import in_place_of_commands
from tests.launching import run_command
from tests.ranks import ensure_server
from tests.tune.conftest import base_run
from trainer.monitor import metrics_file

__all__ = ["base_run"]  # a fixture, used by name
SMALL = [
    "data.sequence_tokens=96",
    "train.steps=2",
    "train.schedule.warmup_steps=0",
    "train.log.peak_tflops=1",
    "train.micro_batch_samples=4",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``polarity`` in small."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 12), ("validation", 4), ("test", 6)):
        rows = [{"prompt": f"Review: {n}\nSentiment:", "response": CHOICES["polarity"][n % 2]} for n in range(count)]
        (folder / f"polarity-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _arguments(base: str, data: Path, out: Path, *more: str) -> list[str]:
    return [base, "--tasks", "polarity", "--seeds", "0", "--data", str(data), "--out", str(out), *more, *SMALL]


def test_runs_are_made_once_and_every_method_has_its_row(
    base_run: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["--methods", "lora", "lora_ensemble", "--repeats", "1"]
    ensure_server()  # before threads start runs
    in_place_of_commands(monkeypatch, run_command)
    table = tmp_path / "table.md"
    assert main(_arguments(base_run, data, tmp_path / "runs", *methods, "--markdown", str(table))) == 0
    first, paired, told = table.read_text().split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    assert [row[0] for row in rows] == ["method", "---", "lora", "lora_ensemble"]
    found = [outcome(tmp_path / f"runs/polarity-{method}-0", "polarity") for method in ("lora", "lora_ensemble")]
    for row, one in zip(rows[2:], found, strict=True):
        assert one is not None and 0 < one.trained < one.total
        assert row[1:3] == [f"{one.trained:,}", f"{one.trained / one.total:.2%}"]
        assert row[4:] == [f"{100 * share:.1f}" for share in one[:4]]
    assert float(rows[2][3]) == 1.0 and float(rows[3][3]) > 0
    assert found[0].voted == found[0].final == found[0].oracle and found[1].oracle >= found[1].best_layer

    own, other = (
        json.loads((tmp_path / f"runs/polarity-{m}-0/answers-polarity.json").read_text())
        for m in ("lora_ensemble", "lora")
    )
    assert list(other) == ["layer-03", "layer-03/per_token"]
    assert list(own)[::2] == ["layer-01", "layer-02", "layer-03", "ensemble", "oracle"]
    assert sum(own["ensemble"]) / 6 == pytest.approx(found[1].voted)
    difference = f"{100 * (sum(own['ensemble']) - sum(other['layer-03'])) / 6:+.1f} ("
    assert paired.splitlines()[2].startswith(f"| lora_ensemble | lora | {difference}") and "bootstrap" in told
    of_final = f"{100 * (sum(own['ensemble']) - sum(own['layer-03'])) / 6:+.1f} ("
    assert paired.splitlines()[3].startswith(f"| lora_ensemble | its final layer | {of_final}")

    in_place_of_commands(monkeypatch, lambda *_, **__: pytest.fail("it was run already"))
    with pytest.raises(SystemExit):
        main(_arguments(base_run, data, tmp_path / "runs", "train.optimizer.weight_decay=0.5", *methods))
    told = capsys.readouterr().err
    assert "polarity-lora-0 holds a run with another config: train.optimizer.weight_decay 0.0 instead of 0.5" in told
    assert main(_arguments(base_run, data, tmp_path / "runs", *methods[:3], "--repeats", "0")) == 0
    assert "lora_ensemble" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_the_status_is_1(
    base_run: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = _arguments(base_run, data, tmp_path / "runs", "--methods", "lora", "--repeats", "0")
    assert main([*wrong, "adapter.rank=0"]) == 1
    told = capsys.readouterr()
    assert "polarity-lora-0: error:" in told.err and "adapter.rank" in told.err
    assert "| lora |  |  |  | - | - | - | - |" in told.out


def test_methods_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Each with the other's run of the same seed; a seed that one of them lacks has no say."""
    methods = ["none", "lora", "lora_ensemble"]
    options = Namespace(methods=methods, tasks=["polarity"], seeds=[0, 1, 2], out=tmp_path, per_token=False)
    runs = {(m, "polarity", s): TuningRun(m, "polarity", s) for m in options.methods for s in options.seeds}
    right = {
        "none": [[0, 0], [0, 0], [0, 0]],
        "lora": [[0, 0], [1, 1], [0, 1]],
        "lora_ensemble": [[1, 1], [1, 0], []],
    }
    for (method, _, seed), run in runs.items():
        if answers := right[method][seed]:
            run.folder(tmp_path).mkdir()
            named = {"layer-03": answers, "layer-03/per_token": [0, 1]}
            if "ensemble" in method:
                named |= {"layer-03": [0, 1], "ensemble": answers, "ensemble/per_token": [1, 1]}
            (run.folder(tmp_path) / "answers-polarity.json").write_text(json.dumps(named))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in paired_lines(options, runs)]
    assert [row[:2] for row in cells] == [
        ["lora", "none"],
        ["lora_ensemble", "none"],
        ["lora_ensemble", "lora"],
        ["lora_ensemble", "its final layer"],
    ]
    assert [row[2].split(" ")[0] for row in cells] == ["+50.0", "+75.0", "+25.0", "+25.0"]  # of +1, +1 and 0, -1
    assert [row[2].split("; ")[1] for row in cells] == ["3)", "2)", "2)", "2)"]
    options.per_token = True
    own = paired_lines(options, runs)[-1].split("|")[3]
    assert own.strip().startswith("+50.0")


def paired_lines(options: Namespace, runs: Runs) -> list[str]:
    """The rows of the table of differences."""
    return tables.paired(options, runs).splitlines()[2:]


def test_spread_over_seeds(tmp_path: Path) -> None:
    assert tables._spread([0.5, 0.6]) == "55.0 ± 7.1"
    assert tables._spread([0.5]) == "50.0" and tables._spread([]) == "-"
    assert TuningRun("full", "polarity", 3).folder(tmp_path) == tmp_path / "polarity-full-3"
    assert outcome(tmp_path, "polarity") is None
    line = {"step": 4, "test/polarity/choice_accuracy/layer-02": 0.7, "test/polarity/choice_accuracy/layer-03": 0.6}
    line |= {f"test/polarity/choice_accuracy_per_token/layer-0{n}": 0.1 for n in (2, 3)}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 0, "parameters/trained": 5, "parameters/total": 9}) + "\n" + json.dumps(line) + "\n"
    )
    assert outcome(tmp_path, "polarity") == Outcome(0.6, 0.6, 0.7, 0.6, 5, 9)
    assert outcome(tmp_path, "polarity", per_token=True) == Outcome(0.1, 0.1, 0.1, 0.1, 5, 9)


def test_jobs_must_be_at_least_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["runs/none", "--jobs", "0"])
    assert "--jobs must be at least 1" in capsys.readouterr().err


def test_a_file_of_questions_is_split_and_rates_are_searched(
    base_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    rows = [
        {"query": f"Question: {n}?", "choices": ["no", "yes", "never"][: 2 + n % 2], "gold": n % 2} for n in range(16)
    ]
    rows[3]["query"] = "Question: 3?\u2028"  # no line break in JSON lines
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "tasks/quiz.jsonl").write_text("".join(lines), encoding="utf-8")
    ensure_server()
    in_place_of_commands(monkeypatch, run_command)
    out = tmp_path / "runs"
    options = [base_run, "--tasks", "quiz", "--seeds", "3", "--data", str(tmp_path / "tuning"), "--out", str(out)]
    options += ["--methods", "none", "lora", "--rates", "1e-9", "5", "--repeats", "0"]
    own = ["train.evaluation.every_steps=2", "train.evaluation.before_first=false"]
    assert main([*options, *SMALL, *own]) == 0

    parts = {split: (out / f"data/quiz-{split}.jsonl").read_text().strip().split("\n") for split in SPLITS}
    numbers = {
        split: [int(json.loads(line)["query"][10:].rstrip("?\u2028")) for line in lines]
        for split, lines in parts.items()
    }
    assert numbers == {"test": list(range(0, 16, 2)), "validation": [1, 11], "train": [3, 5, 7, 9, 13, 15]}

    losses = {}
    for rate in ("2e-12", "0.01"):
        latest = metrics_file.latest(out / f"quiz-lora-3-lr{rate}/metrics.jsonl")
        losses[rate] = latest["validation/quiz/loss"]
    told = [json.loads(line) for line in (out / "quiz-lora-3-lr0.01/metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in told if "validation/quiz/loss" in line} == {2}  # not before the first
    best = min(losses, key=losses.__getitem__)
    rows_told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| lora ")]
    assert f"| {float(best):g} |" in rows_told[0] and losses["2e-12"] != losses["0.01"]
    # The base as it is: what a rate of nothing ends at, after two steps or one.
    none = metrics_file.latest(out / "quiz-none-3/metrics.jsonl")
    assert none["validation/quiz/loss"] == pytest.approx(losses["2e-12"], abs=1e-5)


def test_a_task_that_is_nowhere_is_one_sentence(
    base_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([base_run, "--tasks", "quiz", "--data", str(tmp_path / "tuning"), "--out", str(tmp_path / "runs")])
    assert "--tasks quiz: there is neither" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none"), "--out", str(tmp_path / "runs")])
    assert "there is no folder" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    with pytest.raises(SystemExit):
        main([base_run, "--rates", "0", "--out", str(tmp_path / "runs")])
    assert "argument --rates: must be a number above 0, at most 1e+12, got '0'" in capsys.readouterr().err
