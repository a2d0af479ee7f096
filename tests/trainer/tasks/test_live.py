"""Tasks in the course of training: figures at every stage, and a run that goes as it would without them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launching import run
from tests.test_commands import run_light
from tests.trainer.tasks.questions import write_questions
from trainer.config import load_run
from trainer.config_blocks import EvaluationConfig
from trainer.distributed import ALONE
from trainer.exit_status import EXIT_MISTAKE
from trainer.monitor import metrics_file
from trainer.tasks.live import LiveTasks

OWN_TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
Lines = dict[int, dict[str, Any]]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [str(path) for path in write_questions(tmp_path / "tasks").values()]


def _train(config: dict[str, Any], write_config: Callable[..., str], name: str, ranks: int) -> tuple[Lines, str]:
    """Every step's line, and what was printed."""
    config = copy.deepcopy(config)
    config["train"]["run_dir"] = f"{config['train']['run_dir']}-{name}"
    ended = run("pretrain.train", write_config(config, f"{name}.yaml"), processes=ranks)
    assert ended.returncode == 0, ended.stdout[-3000:]
    lines = metrics_file.read(Path(config["train"]["run_dir"]) / metrics_file.NAME)
    return {line["step"]: line for line in lines}, ended.stdout


def _losses(lines: Lines) -> list[Any]:
    names = ("train/loss", "optimizer/grad_norm", "validation/code/loss", "validation/code/loss_with_noise")
    return [lines[step].get(name) for step in sorted(lines) for name in names]


def test_a_run_goes_as_without_them_and_any_number_of_ranks_finds_the_same(
    tiny: dict[str, Any], write_config: Callable[..., str], files: list[str], tmp_path: Path
) -> None:
    """Under ZeRO 3 with two ranks, an odd number of passes and answers of other lengths, and a task of the harness."""
    pytest.importorskip("lm_eval")
    (tmp_path / "own.yaml").write_text(OWN_TASK.format(data=files[2]))
    tiny["deepspeed"]["zero_stage"] = 3
    bare, _ = _train(tiny, write_config, "bare", 2)
    tiny["train"]["evaluation"]["tasks"] = [f"{tmp_path}/tasks/*.jsonl", str(tmp_path / "own.yaml")]
    sharded, printed = _train(tiny, write_config, "sharded", 2)
    assert _losses(sharded) == _losses(bare)
    figures = ["choose/acc", "choose/acc_norm", "fill/acc", "go_on/acc", "go_on/perplexity", "say/exact_match"]
    figures = [f"tasks/{name}" for name in [*figures, "own/exact_match"]]
    for step in (0, 2, 4):
        assert all(name in sharded[step] for name in figures)
        assert 0 < sharded[step]["tasks/share_of_time"] < 1 and sharded[step]["tasks/seconds"] > 0
        assert f"step {step:>6}  tasks: choose acc {sharded[step]['tasks/choose/acc']:.3f} ± " in printed
    assert not [name for name in sharded[1] if name.startswith("tasks/")]
    assert "tasks beside evaluations: choose (2 questions), fill (2 questions), " in printed
    tiny["deepspeed"]["zero_stage"] = 0
    tiny["train"]["evaluation"] |= {"tasks": files, "task_every_steps": 4}
    whole, _ = _train(tiny, write_config, "whole", 1)
    assert not [name for name in whole[2] if name.startswith("tasks/")]  # evaluated, but without tasks
    for name in figures[:-1]:
        for step in (0, 4):
            assert whole[step][name] == pytest.approx(sharded[step][name], rel=1e-4)


def test_files_are_looked_at_before_anything_heavy(
    tiny: dict[str, Any], write_config: Callable[..., str], files: list[str]
) -> None:
    Path(files[0]).write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\n')
    lists = [[write_config(tiny), f"train.evaluation.tasks=[{name}]"] for name in (files[0], "no/such.jsonl")]
    wrong, missing = run_light("pretrain.train", *lists)
    assert (
        wrong[0] == EXIT_MISTAKE
        and "choose.jsonl, line 1 has gold 2, which is not the index of one of its 2 choices" in wrong[1]
    )
    assert missing[0] == EXIT_MISTAKE and "no file matches 'no/such.jsonl'" in missing[1]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.router.kind=expert_choice", "router.kind expert_choice picks tokens by looking at later ones"),
        ("data.dir=no-such", "no-such has no tokenizer"),
        ("train.evaluation.task_shots=2", "has 2 different lines, but each question takes 2 of the others"),
    ],
)
def test_runs_that_cannot_have_them(
    tiny: dict[str, Any], write_config: Callable[..., str], files: list[str], override: str, sentence: str
) -> None:
    config = load_run(write_config(tiny), [f"train.evaluation.tasks=[{files[0]}]", override])
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        LiveTasks(config, Path(config.data.dir), ALONE)


def test_names_need_the_harness(
    tiny: dict[str, Any], write_config: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run(write_config(tiny), ["train.evaluation.tasks=[piqa]"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="lm_eval is not installed; install it with: "):
        LiveTasks(config, Path(config.data.dir), ALONE)


def test_how_often() -> None:
    config = EvaluationConfig(every_steps=10, tasks=["piqa"], task_every_steps=20)
    assert [step for step in range(0, 46, 5) if config.has_tasks(step, 45)] == [0, 20, 40, 45]
    assert EvaluationConfig(every_steps=10, tasks=["piqa"]).has_tasks(10, 45)
    assert not EvaluationConfig(every_steps=10).has_tasks(10, 45)
    with pytest.raises(ValueError, match=r"task_every_steps \(15\) must be a multiple of every_steps \(10\)"):
        EvaluationConfig(every_steps=10, task_every_steps=15)
