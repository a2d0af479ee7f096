"""What the command keeps, goes on with and shares: finished tasks, ranks, the harness's own tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from data.sentencepiece_file import load_tokenizer, model_proto
from evals.harness.__main__ import main
from evals.harness.tasks import HUB_ONE_SHOT
from evals.scoring import open_model
from tests.evals.tiny import broken_weights, weights_folder
from tests.launching import run
from tests.trainer.tasks.questions import write_questions
from trainer.tasks import harness


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    return weights_folder(tmp_path_factory.mktemp("commands") / "weights", "layer", corpus)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_questions(tmp_path / "data/tasks")
    return tmp_path / "data"


def test_two_ranks_have_the_scores_of_one(weights: Path, data: Path, tmp_path: Path) -> None:
    options = [str(weights), "--tasks", "one_shot", "--data", str(data), "--batch-tokens", "64"]
    assert main([*options, "--json", str(tmp_path / "one.json")]) == 0
    ended = run("evals.harness", *options, "--json", str(tmp_path / "two.json"), processes=2)
    assert ended.returncode == 0, ended.stdout[-3000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["ours"]["loglikelihoods"].keys() == two["ours"]["loglikelihoods"].keys() and len(one["ours"]["cut"]) == 0
    for task, values in one["ours"]["loglikelihoods"].items():
        assert two["ours"]["loglikelihoods"][task] == pytest.approx(values, abs=1e-5)
    for task, own in one["ours"]["metrics"].items():
        assert two["ours"]["metrics"][task] == pytest.approx(own, abs=1e-5), task
    assert two["flops_share"] == pytest.approx(one["flops_share"], rel=1e-12)
    assert ended.stdout.count("executed ") == ended.stdout.count("wrote ") == 1 and "s, 2 ranks, fp32" in ended.stdout


def test_a_rerun_takes_what_is_finished(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores.json"
    options = [str(weights), "--data", str(data), "--json", str(out)]
    assert main([*options, "--tasks", "choose", "go_on"]) == 0
    before, kept = json.loads(out.read_text()), tmp_path / "scores.tasks.jsonl"
    kept.write_text(kept.read_text() + '{"task": "sa')  # a kill
    ran: list[str] = []
    evaluate = harness.evaluate

    def noted(model: Any, tasks: Any, *rest: Any) -> Any:
        ran.extend(task["task"] for task in tasks)
        return evaluate(model, tasks, *rest)

    monkeypatch.setattr(harness, "evaluate", noted)
    capsys.readouterr()
    assert main([*options, "--tasks", "choose", "go_on", "fill"]) == 0
    printed, after = capsys.readouterr().out, json.loads(out.read_text())
    assert ran == ["fill"] and f"choose: taken from {kept}, where it is finished" in printed
    assert after["ours"]["metrics"].keys() == {"choose", "go_on", "fill"}
    assert after["ours"]["loglikelihoods"]["choose"] == before["ours"]["loglikelihoods"]["choose"]
    assert main([*options, "--tasks", "choose", "--limit", "1"]) == 0
    assert f"choose: {kept} has it with another limit; it is computed again" in capsys.readouterr().out
    (data / "tasks/go_on.jsonl").write_text('{"context": "import", "continuation": "sys"}\n')
    assert main([*options, "--tasks", "go_on", "--shots", "0", "--dtype", "bf16"]) == 0
    assert f"go_on: {kept} has it with another dtype and files; it is computed again" in capsys.readouterr().out
    assert ran == ["fill", "choose", "go_on"]
    assert main([*options, "--tasks", "fill"]) == 0
    assert f"fill: taken from {kept}" in capsys.readouterr().out  # its line stands apart from the one that was cut
    proto = model_proto(load_tokenizer(weights))
    proto.pieces[-1].score -= 1.0
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    other = weights_folder(tmp_path / "other", "layer", {"dir": str(tmp_path)})
    assert main([str(other), *options[1:], "--tasks", "choose", "--limit", "1"]) == 0
    told = "it with another model, weights and tokenizer; it is computed again"
    assert told in capsys.readouterr().out
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "import os", "body": "return"}\n')
    for field in ("text", "body"):
        assert main([*options, "--tasks", "perplexity", "--text", str(text), "--text-field", field]) == 0
    assert "perplexity: " + str(kept) + " has it with another text field; it" in capsys.readouterr().out
    kept.write_text('{"task": "choose"}\n')
    with pytest.raises(SystemExit):
        main([*options, "--tasks", "choose"])
    assert "scores.tasks.jsonl, line 1 is not a finished task of this command; move the" in capsys.readouterr().err


def test_bf16_is_near_fp32(weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / f"{dtype}.json"
        assert main([str(weights), "--tasks", "go_on", "--data", str(data), "--dtype", dtype, "--json", str(out)]) == 0
        found[dtype] = json.loads(out.read_text())["ours"]["loglikelihoods"]["go_on"]
    assert found["bf16"] != found["fp32"] and found["bf16"] == pytest.approx(found["fp32"], rel=0.1)
    assert "bf16 on cpu, batches of up to 1,024 tokens with " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "document"), [("choose", 0), ("fill", 0), ("go_on", 1), ("say", 1), ("perplexity", 1)]
)
def test_logits_that_are_not_finite_choose_nothing(
    weights: Path,
    data: Path,
    corpus: dict[str, Any],
    tmp_path: Path,
    task: str,
    document: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The questions hold ``return`` and ``import``, of which one breaks the model."""
    tokenizer, text = open_model(weights).tokenizer, tmp_path / "text.jsonl"
    text.write_text('{"text": "import os"}\n{"text": "return a"}\n')
    token = min(set(tokenizer.encode("return")) - set(tokenizer.encode("import os")))
    broken = broken_weights(tmp_path / "broken", "layer", corpus, token)
    with pytest.raises(SystemExit) as ended:
        main([str(broken), "--tasks", task, "--data", str(data), "--text", str(text)])
    told = f"error: {task}, document {document} (the first is 0): the logits of {broken} are not finite"
    assert ended.value.code == 1 and told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_names_of_the_harness() -> None:
    """The list against its registry, of thousands of files."""
    known = harness.known_tasks(hub=True)
    assert set(HUB_ONE_SHOT) <= set(known.all_tasks) and len(HUB_ONE_SHOT) == len(set(HUB_ONE_SHOT)) == 26


def test_a_task_of_the_hub_that_is_misspelt_or_out_of_reach(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import tasks

    known = harness.known_tasks(include=Path(tasks.__file__).parent / "piqa")
    monkeypatch.setattr(harness, "known_tasks", lambda *_, **__: known)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries: 23 seconds of waiting
    with pytest.raises(SystemExit) as ended:
        main([str(weights), "--tasks", "piqaa", "--hub"])
    assert ended.value.code == 1 and "there is no task 'piqaa'; did you mean 'piqa'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(weights), "--tasks", "piqa", "--hub"])
    assert "error: task 'piqa' cannot be loaded (" in (error := capsys.readouterr().err.splitlines()[-1])
    assert "check that it can be reached, or leave the task out" in error
    with pytest.raises(ValueError, match=r"train.evaluation.tasks: there is no task 'piqaa'; did you mean 'piqa'\?"):
        harness.HarnessTasks(["piqaa"], None, 0)


@pytest.mark.parametrize(
    ("options", "ranks", "sentence"),
    [
        (["--device", "tpu"], "1", "--device must be cpu or cuda (or cuda:N), got tpu"),
        (["--device", "cuda:1"], "2", "--device cuda:1 is one device, but there are 2 ranks; give --device cuda"),
        (["--against", "x"], "2", "--against runs the harness's own loader, in one process; start it with python"),
    ],
)
def test_placements_that_cannot_be(
    weights: Path, options: list[str], ranks: str, sentence: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SystemExit) as ended:
        main([str(weights), "--tasks", "blimp", *options])
    assert ended.value.code == 1 and sentence in capsys.readouterr().err
