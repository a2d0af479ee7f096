"""The harness gets our likelihoods, the same from an export, and refuses what it cannot do."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from convert.to_hf import main as export
from evals.harness.__main__ import main
from evals.harness.report import differences, table
from evals.harness.tasks import local_tasks
from evals.perplexity import perplexity
from evals.scoring import open_model
from tests.evals.harness.plain import answer_likelihood, likelihood, our_model, refused
from tests.evals.tiny import POSITIONS, weights_folder
from tests.trainer.tasks.questions import QUESTIONS, write_questions
from trainer.tasks.harness import HarnessTasks, OurModel, TaskScores, evaluate, known_tasks, load
from trainer.tasks.scorer import Scorer

PAIRS = [("return a\n", "return return a\n"), ("x = y + 1\n", "x y = + 1\n"), ("for a in b:\n", "for in a b:\n")]
TEXTS = ["def add(a, b):\n    return a\n", "import os\n"]
LABELLED = [("x = 1\nmood:", " good"), ("y = 2\nmood:", " bad"), ("return\nmood:", " good")]
EXAMPLES = [("a = b\nmood:", " bad")]
OWN_TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: generate_until
test_split: train
fewshot_split: train
doc_to_text: "{{{{sentence_good}}}}"
doc_to_target: "{{{{sentence_bad}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    return weights_folder(tmp_path_factory.mktemp("harness") / "weights", "layer", corpus)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two paradigms of minimal pairs, prompts with labels, others with long answers, and a text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "blimp").mkdir()
    rows = [json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n" for good, bad in PAIRS]
    (folder / "blimp/one.jsonl").write_text("".join(rows))
    (folder / "blimp/two.jsonl").write_text("".join(rows[:2]))
    (folder / "tuning").mkdir()
    for name, split, rows in (("mood", "test", LABELLED), ("mood", "train", EXAMPLES), ("bare", "test", LABELLED)):
        pairs = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in rows]
        (folder / f"tuning/{name}-{split}.jsonl").write_text("".join(pairs))
    (folder / "tuning/long-test.jsonl").write_text(
        "".join(json.dumps({"prompt": "a", "response": str(n)}) + "\n" for n in range(21))
    )
    (folder / "tuning/torn-test.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    return folder


class Request:
    """To generate, of a task called ``own``."""

    def __init__(self, context: str, **options: Any) -> None:
        self.args, self.task_name = (context, options), "own"


def test_likelihoods_are_those_of_plain_passes(weights: Path, data: Path, tmp_path: Path) -> None:
    tasks = local_tasks(["blimp", "perplexity"], data, data / "texts.jsonl", 0)
    opened = open_model(weights)
    outcome = evaluate(our_model(weights), tasks)
    expected = [likelihood(weights, sentence) for pair in PAIRS for sentence in pair]
    assert outcome.loglikelihoods["blimp_one"] == pytest.approx(expected, abs=1e-3)
    right = sum(good > bad for good, bad in zip(expected[::2], expected[1::2], strict=True))
    assert outcome.metrics["blimp_one"]["acc"] == pytest.approx(right / 3)
    assert outcome.documents == {"blimp_one": 3, "blimp_two": 2, "perplexity": 2}
    assert outcome.loglikelihoods["perplexity"] == pytest.approx([likelihood(weights, t) for t in TEXTS], abs=1e-3)
    # Where a document fits into one window, both commands say the same.
    own = perplexity(opened, iter(TEXTS), "texts", POSITIONS, POSITIONS)
    assert outcome.metrics["perplexity"]["bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=1e-5)


@pytest.mark.parametrize("shots", [None, 0])
def test_labels_are_chosen_by_their_likelihood(weights: Path, data: Path, tmp_path: Path, shots: int | None) -> None:
    """After one example of the training file, unless told otherwise."""
    outcome = evaluate(our_model(weights), local_tasks(["classify_mood"], data, None, shots))
    before = "" if shots == 0 else "".join(f"{prompt}{label}\n\n" for prompt, label in EXAMPLES)
    expected = [
        answer_likelihood(weights, before + prompt, label) for prompt, _ in LABELLED for label in (" bad", " good")
    ]
    assert outcome.loglikelihoods["classify_mood"] == pytest.approx(expected, abs=1e-3)
    chosen = [" bad" if bad > good else " good" for bad, good in zip(expected[::2], expected[1::2], strict=True)]
    right = sum(label == said for (_, label), said in zip(LABELLED, chosen, strict=True))
    assert outcome.metrics["classify_mood"]["acc"] == pytest.approx(right / len(LABELLED))


def test_windows_of_a_long_text(weights: Path, data: Path, tmp_path: Path) -> None:
    model = our_model(weights, 8)
    whole = evaluate(model, local_tasks(["perplexity"], None, data / "text.txt", 0))
    assert whole.documents == {"perplexity": 1} and len(whole.loglikelihoods["perplexity"]) == 1
    tokens = len(model.tok_encode("\n\n".join(TEXTS)))
    assert tokens > 8 and model.scorer.routed.head_tokens == tokens  # each is scored once


def test_the_export_has_the_same_scores(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export([str(weights), str(tmp_path / "hf")])
    options = ["--data", str(data), "--text", str(data / "texts.jsonl"), "--against", str(tmp_path / "hf")]
    assert "--trust-remote-code" in refused(capsys, str(weights), *options)
    out = tmp_path / "out.json"
    assert main([str(weights), *options, "--trust-remote-code", "--window", "16", "--json", str(out)]) == 0
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert set(written["differences"]) == {"blimp_one", "blimp_two", "perplexity"}
    assert max(written["differences"].values()) <= 1e-4
    assert written["ours"]["metrics"]["blimp_one"] == written["export"]["metrics"]["blimp_one"]
    assert "difference, nats" in printed and "acc, mean" in printed and str(out) in printed


def test_tasks_of_the_users_own(weights: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN_TASK.format(data=data / "blimp/one.jsonl"))
    model = our_model(weights)
    outcome = evaluate(model, load("own", known_tasks(tmp_path)), limit=2, shots=1)
    assert outcome.documents == {"own": 2} and "exact_match" in outcome.metrics["own"]
    assert outcome.loglikelihoods == {"own": []} and differences(outcome, outcome) == {"own": 0.0}
    assert "own" in table(outcome)


def test_a_task_that_judges_each_answer_in_two_ways_has_both_figures(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict, loose = ({"function": name} for name in ("take_first", "lowercase"))
    ways = [{"name": "strict-match", "filter": [strict]}, {"name": "small-letters", "filter": [loose, strict]}]
    own = OWN_TASK.format(data=data / "blimp/one.jsonl") + f"filter_list: {json.dumps(ways)}\n"
    (tmp_path / "own.yaml").write_text(own)
    monkeypatch.setattr(OurModel, "generate_until", lambda _, asked, **__: [PAIRS[r.doc_id][1].upper() for r in asked])
    outcome = evaluate(our_model(weights), load("own", known_tasks(tmp_path)))
    assert outcome.metrics == {"own": {"exact_match/strict-match": 0.0, "exact_match/small-letters": 1.0}}
    assert outcome.errors["own"].keys() == outcome.metrics["own"].keys() and outcome.documents == {"own": 3}
    head, *lines = table(outcome, outcome).splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["own", "exact_match/strict-match", "0.0000", "0.0000"],
        ["own", "exact_match/small-letters", "1.0000", "1.0000"],
    ]
    assert {len(line) for line in lines} == {len(head)}


def test_what_does_not_fit_in_training_is_told_by_the_field_that_mends_it(
    weights: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(OWN_TASK.format(data=data / "blimp/one.jsonl"))
    opened = open_model(weights)
    with pytest.raises(ValueError, match=r"own generates up to 6 tokens.* or raise data.sequence_tokens$"):
        tasks = HarnessTasks([str(tmp_path / "own.yaml")], None, 0)
        tasks.run(Scorer(opened.decoder, 256), opened.tokenizer, 6, lockstep=False)


def test_generation_ends_where_it_is_told(weights: Path) -> None:
    model = our_model(weights)

    free, empty = model.generate_until([Request("return", max_gen_toks=12), Request("", max_gen_toks=2)])
    assert isinstance(empty, str) and len(free) > 3
    stop = free[2:4]
    (ended,) = model.generate_until([Request("return", max_gen_toks=12, until=[stop])])
    assert ended == free[: free.index(stop)]
    assert not model.cut
    long = Request("return " * 200, max_gen_toks=4)
    assert model.generate_until([long, Request("return", max_gen_toks=4)]) and model.cut == {"own": 1}  # on the left
    with pytest.raises(
        ValueError, match=r"own generates up to 64 tokens, which leaves no room for its prompts in a wi"
    ):
        model.generate_until([Request("return", max_gen_toks=64)])


def test_contexts_that_do_not_fit_are_counted_in_both_models(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scored and generated ones; what fits into a larger window is not told."""
    if not (tmp_path / "hf").exists():
        export([str(weights), str(tmp_path / "hf")])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/own.yaml").write_text(OWN_TASK.format(data=data / "blimp/one.jsonl"))
    options = [str(weights), "--tasks", "classify_mood", "own", "--data", str(data), "--against", str(tmp_path / "hf"),
               "--include", str(tmp_path / "tasks"), "--trust-remote-code", "--shots", "1",
               "--json", str(tmp_path / "out.json")]  # fmt: skip
    opened = open_model(weights)
    before = "".join(f"{prompt}{label}\n\n" for prompt, label in EXAMPLES)
    asked = [
        len(opened.tokenizer.encode(before + prompt + label)) for prompt, _ in LABELLED for label in (" bad", " good")
    ]
    window = max(asked) - 2
    expected = sum(tokens > window + 1 for tokens in asked)
    assert 0 < expected < len(asked)
    assert main([*options, "--window", str(window)]) == 0
    written, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert written["ours"]["cut"]["classify_mood"] == written["export"]["cut"]["classify_mood"] == expected
    assert written["ours"]["cut"]["own"] == written["export"]["cut"]["own"] > 0
    for name in ("ours", "the export"):
        assert (
            f"classify_mood: {expected} of {len(asked)} requests did not fit into a window of {window} tokens and "
            f"reached {name} without the start of their context; raise --window, or give fewer --shots"
        ) in printed
    assert main([*options, "--window", str(POSITIONS)]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["ours"]["cut"] == {}
    assert "did not fit" not in capsys.readouterr().out


def test_an_export_that_keeps_its_adapters_apart(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.json").write_text("{}")
    options = ["--tasks", "blimp", "--data", str(data), "--against", str(tmp_path)]
    assert "has separate adapters in adapter/, and would be" in refused(capsys, str(weights), *options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "blimp"], "say with --data where DATA is"),
        (["--tasks", "one_shot"], "one_shot reads tasks/*.jsonl in DATA, which --data names, but there is none"),
        (["--tasks", "one_shot", "--data", "DATA"], "but there is none; see docs/evaluation.md"),
        (["--tasks", "perplexity"], "name it with --text"),
        (["--tasks", "blimp", "--data", "/nowhere"], "holds no *.jsonl with minimal pairs"),
        (["--tasks", "perplexity", "--data", "DATA"], "there is no file"),
        (["--tasks", "blimp_on", "--data", "DATA"], "did you mean 'blimp_one'?"),
        (["--tasks", "classify_mood"], "say with --data where DATA is"),
        (["--tasks", "classify_mood", "--data", "/nowhere"], "holds no NAME-test.jsonl to classify"),
        (["--tasks", "classify_mod", "--data", "DATA"], "did you mean 'classify_mood'?"),
        (["--tasks", "classify_long", "--data", "DATA"], "has 21 different responses"),
        (["--tasks", "classify_bare", "--data", "DATA"], "bare-train.jsonl, which is missing"),
        (
            ["--tasks", "classify_torn", "--data", "DATA"],
            "torn-test.jsonl, line 1 has no text in response; every line has prompt and",
        ),
        (["--tasks", "unheard"], "there is no task 'unheard'; there are: blimp, classify_NAME, one_shot, perplexity"),
        (["--tasks", "x", "--include", "/nowhere"], "there is no folder /nowhere"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--shots", "-1"], "--shots must be at least 0"),
        (["--tasks", "blimp", "--data", "DATA", "--window", "65"], "--window must be 1 to 64"),
        (["--tasks", "blimp", "--data", "DATA", "--window", "1"], "does not fit into a window of 1"),
        (["--tasks", "blimp", "--data", "DATA", "--against", "DATA"], "has no config.json"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_options_that_cannot_be(
    weights: Path, data: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, str(weights), *[str(data) if o == "DATA" else o for o in options])


def test_without_the_library(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "requirements-dev.txt" in refused(capsys, str(weights), "--tasks", "blimp")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder / "tasks")
    return folder


def test_questions_of_every_shape(weights: Path, questions: Path, tmp_path: Path) -> None:
    """Likelihoods are those of plain passes, and metrics follow from them."""
    tasks = local_tasks(list(QUESTIONS), questions, None, None)
    outcome = evaluate(our_model(weights), tasks)
    found = outcome.loglikelihoods
    chosen = [answer_likelihood(weights, "Question: x = 1\nAnswer:", f" {c}") for c in ("return a", "import os")]
    chosen += [answer_likelihood(weights, "y =", f" {c}") for c in ("2", "import", "b")]
    assert found["choose"] == pytest.approx(chosen, abs=1e-3)
    right = [chosen[1] > chosen[0], chosen[2] == max(chosen[2:])]
    assert outcome.metrics["choose"]["acc"] == pytest.approx(sum(right) / 2)
    assert {"acc", "acc_norm"} == outcome.metrics["choose"].keys() == outcome.errors["choose"].keys()
    filled = [answer_likelihood(weights, context, " os") for context in ("return a", "import", "b", "import")]
    assert found["fill"] == pytest.approx(filled, abs=1e-3)
    assert outcome.metrics["fill"] == {"acc": ((filled[1] > filled[0]) + (filled[3] > filled[2])) / 2}
    went_on = [answer_likelihood(weights, *parts) for parts in (("import", " os"), ("return", " a"))]
    assert found["go_on"] == pytest.approx(went_on, abs=1e-3)
    assert outcome.metrics["go_on"]["perplexity"] == pytest.approx(math.exp(-sum(went_on) / 2), rel=1e-3)
    assert outcome.metrics["say"] == {"exact_match": 0.0} and outcome.documents["say"] == 2


def test_an_answer_is_right_by_any_alias_whatever_its_case_and_stops(
    weights: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(self: OurModel, asked: list[Any], **_: Any) -> list[str]:
        return [" Os" if "import" in request.args[0] else "a" for request in asked]

    monkeypatch.setattr(OurModel, "generate_until", answers)
    outcome = evaluate(our_model(weights), local_tasks(["say"], questions, None, 0))
    assert outcome.metrics["say"] == {"exact_match": 0.5}


def test_one_shot_is_all_files_with_one_example_of_their_own(
    weights: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main([str(weights), "--tasks", "one_shot", "--data", str(questions), "--json", str(out)]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert set(written["ours"]["metrics"]) == set(QUESTIONS)
    assert "std. error" in printed and "others" in printed and "acc, mean" in printed
    assert f"executed {written['flops_share']:.1%} of the FLOPs" in printed and 0 < written["flops_share"] < 1
    # The other question of the file stands before each.
    example = "y = 2\n\nQuestion: x = 1\nAnswer:"
    expected = [answer_likelihood(weights, example, f" {choice}") for choice in ("return a", "import os")]
    assert written["ours"]["loglikelihoods"]["choose"][:2] == pytest.approx(expected, abs=1e-3)


def test_a_single_document_has_no_standard_error() -> None:
    scores = TaskScores(
        {"one": {"acc": 1.0}, "two": {"acc": 0.0}},
        {"one": 1, "two": 1},
        {"one": [], "two": []},
        {"one": {}, "two": {}},
        {},
    )
    assert table(scores).splitlines()[-1].split() == ["others", "acc,", "mean", "0.5000", "2"]


def test_examples_that_are_too_few(weights: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "classify_mood", "--data", str(data), "--shots", "2"]
    assert "mood-train.jsonl has 1 examples, fewer than --shots 2" in refused(capsys, str(weights), *options)


def test_a_column_holds_a_perplexity_of_any_size() -> None:
    scores = TaskScores(
        {"far": {"perplexity": 883763642.8}}, {"far": 20}, {"far": []}, {"far": {"perplexity": 6.5e8}}, {}
    )
    assert table(scores).splitlines()[1].split() == ["far", "perplexity", "8.84e+08", "6.5e+08", "20"]
