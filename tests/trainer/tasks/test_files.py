"""Files of questions give the requests and the figures of lm-evaluation-harness, without it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from data.questions import find_tasks, read_questions
from data.tokenization import TextTokenizer, load_text_tokenizer
from tests.evals.tiny import POSITIONS, broken_weights, weights_folder
from tests.threads import one_thread as one_thread
from tests.trainer.tasks.questions import QUESTIONS, write_questions
from trainer.distributed import ALONE
from trainer.tasks.answers import answer
from trainer.tasks.files import FileTask, Score
from trainer.tasks.scorer import Scorer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    return weights_folder(tmp_path_factory.mktemp("files") / "weights", "layer", corpus)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = write_questions(tmp_path_factory.mktemp("data") / "tasks")
    paths["several"] = paths["say"].with_stem("several")
    lines = [{"query": f"Question: x = {n} ", "choices": [f"return {n}", "import"], "gold": n % 2} for n in range(9)]
    paths["several"].write_text("".join(json.dumps(line) + "\n" for line in [*lines, *lines[:3]]))
    return paths


def _judged(task: FileTask, weights: Path) -> tuple[Score, list[float]]:
    from evals.scoring import open_model

    opened = open_model(weights)
    scores = Scorer(opened.decoder, 256).score(task.windows)
    answers = answer(opened.decoder, opened.tokenizer, task.prompts, ALONE)
    return task.judge(scores, answers), [score.loglikelihood for score in scores]


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("name", [*QUESTIONS, "several"])
def test_figures_are_those_of_the_harness(
    weights: Path, files: dict[str, Path], name: str, shots: int, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from evals.harness.tasks import local_tasks
    from evals.scoring import open_model
    from trainer.tasks.harness import OurModel, evaluate

    opened = open_model(weights)
    window = POSITIONS if name != "say" or not shots else 40
    model = OurModel(Scorer(opened.decoder, 256), opened.tokenizer, window)
    theirs = evaluate(model, local_tasks([name], files[name].parent.parent, None, shots))
    task = FileTask(files[name], opened.tokenizer, window, shots=shots)
    ours, likely = _judged(task, weights)
    assert likely == pytest.approx(theirs.loglikelihoods[name], abs=1e-4)
    assert ours.metrics == pytest.approx(theirs.metrics[name], rel=1e-4)
    assert next(iter(ours.metrics)) in ("acc", "exact_match")
    errors = {metric: error for metric, error in theirs.errors[name].items() if metric in ours.errors}
    assert ours.errors == pytest.approx(errors, abs=1e-6) and ours.questions == theirs.documents[name]


def _tokenizer(weights: Path) -> TextTokenizer:
    return load_text_tokenizer(weights)


def test_an_answer_is_right_by_letters_alone(weights: Path, files: dict[str, Path]) -> None:
    task = FileTask(files["say"], _tokenizer(weights), POSITIONS)
    assert task.judge([], [" Os", "a"]).metrics == {"exact_match": 0.5}
    assert task.judge([], ["sys.", "ZZ!"]).metrics == {"exact_match": 1.0}


@pytest.mark.parametrize("name", QUESTIONS)
def test_logits_that_are_not_finite_choose_nothing(
    weights: Path, files: dict[str, Path], corpus: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """The figures are NaN, and a training run goes on; so do the harness's."""
    tokenizer = _tokenizer(weights)
    broken = broken_weights(tmp_path / "broken", "layer", corpus, tokenizer.encode("return")[0])
    score, _ = _judged(FileTask(files[name], tokenizer, POSITIONS), broken)
    sound, _ = _judged(FileTask(files[name], tokenizer, POSITIONS), weights)
    assert score.metrics.keys() == sound.metrics.keys() and score.errors.keys() == sound.errors.keys()
    assert all(map(math.isnan, [*score.metrics.values(), *score.errors.values()])) and score.questions == 2


def test_a_limit_and_what_does_not_fit(weights: Path, files: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = _tokenizer(weights)
    assert len(FileTask(files["choose"], tokenizer, POSITIONS, limit=1).windows) == 2
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"context": "return " * 60, "continuation": "a"}) + "\n")
    task = FileTask(long, tokenizer, POSITIONS)
    assert task.cut == 1 and len(task.windows[0].inputs) == POSITIONS
    long.write_text(json.dumps({"context": "a", "continuation": "return " * 80}) + "\n")
    with pytest.raises(ValueError, match=r"question 1 takes \d+ tokens more than a window of 64 holds; raise data."):
        FileTask(long, tokenizer, POSITIONS)
    with pytest.raises(ValueError, match=r"2 different lines, but each question takes 2 of the others .*task_shots"):
        FileTask(files["say"], tokenizer, POSITIONS, shots=2)
    with pytest.raises(ValueError, match=r"say.jsonl: the answer to question 1 takes 10 tokens more"):
        FileTask(files["say"], tokenizer, 15)


def test_files_and_names(files: dict[str, Path], tmp_path: Path) -> None:
    folder = files["say"].parent
    found, others = find_tasks([f"{folder}/*.jsonl", "piqa"])
    assert [path.stem for path in found] == sorted(files) and others == ["piqa"]
    with pytest.raises(ValueError, match="two tasks are called 'say'"):
        find_tasks([str(files["say"]), "say"])
    with pytest.raises(ValueError, match="no file matches"):
        find_tasks([f"{folder}/saay.jsonl"])
    aliases = tmp_path / "aliases.jsonl"
    aliases.write_text('{"context": "a", "answer": "b", "aliases": "c"}\n')
    with pytest.raises(ValueError, match=r"aliases.jsonl, line 1 has no list of texts in aliases"):
        read_questions(aliases)
    question = {"context": "a", "answer": "na\u00efve", "aliases": ["b"]}
    line = json.dumps(question, ensure_ascii=False)
    for content in (b"\xef\xbb\xbf" + line.encode(), line.encode("utf-16"), f"[{line}]".encode()):
        aliases.write_bytes(content)
        assert read_questions(aliases).lines == [question]
    aliases.write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=r"aliases.jsonl, line 1 is not valid Unicode .* save the file as UTF-8"):
        read_questions(aliases)


def test_files_alone_do_not_import_the_harness() -> None:
    import subprocess

    code = "import trainer.tasks.live, sys; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
