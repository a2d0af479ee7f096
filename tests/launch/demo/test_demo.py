"""The demo's commands are those that a user would type; it goes on where it was stopped, from scratch when done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.demo import __main__ as demo
from launch.demo.estimate import Speed, measure
from launch.demo.screen import Screen
from launch.demo.stages import Demo
from tests.launching import ROOT, run
from trainer.config import load_run
from tune.resolve import load_file

NAMES = ["tokenizer", "data", "stage one", "examples", "stage two", "export", "answers"]


def shipped() -> Demo:
    one, two = Path("configs/demo.yaml"), Path("configs/tune_demo.yaml")
    return Demo(one, two, load_run(ROOT / one), load_file(ROOT / two))


def test_commands_in_order_with_this_environments_programs() -> None:
    python, deepspeed = sys.executable, str(Path(sys.executable).with_name("deepspeed"))
    launcher = [deepspeed, "--log_level", "error", "--num_gpus", "2", "--master_port", "29123"]
    stages = shipped().stages(2, 29123)
    assert [stage.name for stage in stages] == NAMES
    assert [stage.command for stage in stages] == [
        [python, "-m", "data.tokenizer", "configs/demo.yaml"],
        [python, "-m", "data.prepare", "configs/demo.yaml"],
        [*launcher, "--module", "pretrain.train", "configs/demo.yaml"],
        [python, "-m", "launch.demo.examples", "runs/demo-data"],
        [*launcher, "--module", "tune.train", "configs/tune_demo.yaml"],
        [python, "-m", "convert.to_hf", "runs/demo-tuned", "runs/demo-hf"],
        [python, "-m", "launch.demo.answers", "runs/demo-hf", "runs/demo-data/brackets-validation.jsonl"],
    ]
    assert Path(deepspeed).exists()
    for stage in stages:
        command = stage.command
        module = command[command.index("--module" if "--module" in command else "-m") + 1]
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_a_missing_config_is_one_sentence_and_status_1() -> None:
    done = run("launch.demo", "configs/no-such.yaml", "configs/tune_demo.yaml")
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1].startswith("error: config file configs/no-such.yaml does not exist")
    assert "demo.yaml" in done.stdout and "Traceback" not in done.stdout


class Machine:
    """Stands in for the commands: what ran, what it would have made, the status or signal of some of them."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.environments: list[Mapping[str, str]] = []
        self.gpus = 0
        self.status: dict[str, int] = {}
        self.stopped_in = ""
        self.signals = 0

    def run(self, command: Sequence[str], environment: Mapping[str, str], screen: Screen) -> int:
        module = next(word for word in command if "." in word and "/" not in word)
        if module == "launch.demo.estimate":
            screen.line(json.dumps({"gpus": self.gpus, "python_s": 0.01, "tokens_per_s": 1000.0}))
            return 0
        self.ran.append(shorter := module.split(".")[-1] if module != "tune.train" else "tune")
        self.environments.append(environment)
        if shorter == self.stopped_in:
            self.signals = 1
        status = self.status.get(shorter, 0)
        if not status and not self.signals:
            self._make(shorter, command)
        return status

    def _make(self, module: str, command: Sequence[str]) -> None:
        if module in ("train", "tune"):
            train = yaml.safe_load(Path(command[-1]).read_text())["train"]
            folder = Path(train["run_dir"]) / "checkpoints" / f"step-{train['steps']:08d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
        elif module == "to_hf":
            Path(command[-1]).mkdir()


@pytest.fixture
def start(
    tmp_path: Path, tiny: dict[str, Any], write_config: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Machine], int]:
    """Starts the demo on a tiny config with ``Machine``'s commands; everything lies in ``tmp_path``."""
    tiny["data"]["dir"] = str(tmp_path / "run-data")
    tuned = yaml.safe_load((ROOT / "configs/tune_demo.yaml").read_text())
    tuned["train"]["run_dir"] = str(tmp_path / "run-tuned")
    for config in (tiny, tuned):
        config["train"] |= {"global_batch_samples": 12, "micro_batch_samples": 2}
    configs = [write_config(tiny), write_config(tuned, "tune.yaml")]

    def started(machine: Machine, processes: int = 3) -> int:
        monkeypatch.setattr(demo, "Commands", lambda: machine)
        monkeypatch.setattr(sys, "argv", ["launch.demo", *configs, f"--processes={processes}", "--again=make demo"])
        return demo.main()

    return started


ALL = ["tokenizer", "prepare", "train", "examples", "tune", "to_hf", "answers"]


def test_it_runs_all_and_says_how_long_and_where(
    start: Callable[[Machine], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine()
    assert start(machine) == 0 and machine.ran == ALL
    assert {environment["DS_ACCELERATOR"] for environment in machine.environments} == {"cpu"}
    said = capsys.readouterr().out
    assert "3 processes on the CPU: about " in said and "[3/7] stage one: 4 steps" in said
    assert f"$ {Path(sys.executable).name} -m data.tokenizer {tmp_path / 'run.yaml'}" in said
    assert all(f"\n{name} " in said for name in [*NAMES, "all"])
    assert f"tensorboard --logdir_spec run:{tmp_path / 'run'},run-tuned:{tmp_path / 'run-tuned'}" in said


def test_what_fails_ends_it_with_its_status(
    start: Callable[[Machine], int], capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine()
    machine.status["train"] = 7
    assert start(machine) == 7 and machine.ran == ALL[:3]
    assert "stopped" not in capsys.readouterr().out


@pytest.mark.parametrize("stopped_in", ALL)
def test_it_goes_on_where_it_was_stopped(
    start: Callable[[Machine], int], stopped_in: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Machine(), Machine()
    first.stopped_in = stopped_in
    assert start(first) == 75 and first.ran == ALL[: ALL.index(stopped_in) + 1]
    assert f"\nstopped in {NAMES[ALL.index(stopped_in)]}; go on with: make demo\n" in capsys.readouterr().out
    assert start(second) == 0
    done = ALL[: ALL.index(stopped_in)]
    # What takes a while is not done twice; what is quick is, since it makes sure that nothing has changed.
    assert second.ran == [name for name in ALL if name not in done or name in ("tokenizer", "prepare", "examples")]
    assert "goes on where the last one stopped" in capsys.readouterr().out


def test_a_stage_whose_product_was_removed_is_done_again(start: Callable[[Machine], int], tmp_path: Path) -> None:
    first, second = Machine(), Machine()
    first.stopped_in = "answers"
    start(first)
    (tmp_path / "run-hf").rmdir()
    assert start(second) == 0 and "to_hf" in second.ran and "train" not in second.ran


def test_after_one_that_was_done_it_starts_afresh_and_keeps_it(
    start: Callable[[Machine], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(Machine()) == 0
    (tmp_path / "run" / "metrics.jsonl").write_text("the run before")
    machine = Machine()
    assert start(machine) == 0 and machine.ran == ALL
    (kept,) = tmp_path.glob("run-before-*")
    assert (kept / "metrics.jsonl").read_text() == "the run before"
    assert list(tmp_path.glob("run-tuned-before-*")) and list(tmp_path.glob("run-hf-before-*"))
    assert f"an earlier demo is kept; remove it when you like: rm -r {kept}" in capsys.readouterr().out


def test_a_run_of_a_user_is_kept_and_data_from_elsewhere_stay(
    start: Callable[[Machine], int], tmp_path: Path, tiny: dict[str, Any], write_config: Callable[..., str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    tiny["data"]["dir"] = str(tmp_path / "elsewhere")
    write_config(tiny)
    assert start(Machine()) == 0
    assert list(tmp_path.glob("run-before-*")) and (tmp_path / "elsewhere").is_dir()


def test_no_more_ranks_than_gpus_and_on_those_that_are_visible(
    start: Callable[[Machine], int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    machine.gpus = 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert start(machine) == 0
    said = capsys.readouterr().out
    assert "--num_gpus 1" in said and "1 GPUs" in said  # a rank more than there are GPUs would only wait
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert start(machine) == 0 and "--include localhost:5 " in capsys.readouterr().out


def test_processes_that_cannot_share_the_batches_are_refused_before_anything_is_moved(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(Machine()) == 0
    before = sorted(tmp_path.iterdir())
    machine = Machine()
    with pytest.raises(SystemExit, match="1"):
        start(machine, processes=4)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --processes (PROCESSES of make) must be 1 or 2 or 3 or 6, got 4, because ")
    assert machine.ran == [] and sorted(tmp_path.iterdir()) == before
    machine.gpus = 5
    assert start(machine, processes=6) == 0 and "--num_gpus 3" in capsys.readouterr().out


def test_make_tells_the_demo_how_it_was_called() -> None:
    # "-o setup": nothing is installed.
    words = ["make", "--no-print-directory", "-n", "-o", "setup", "demo", "PROCESSES=1"]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.strip().endswith('--processes 1 --again "make demo PROCESSES=1"')


def test_a_machine_that_cannot_be_measured_is_one_sentence(
    start: Callable[[Machine], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine()
    monkeypatch.setattr(machine, "run", lambda command, environment, screen: screen.line("no torch") or 1)
    with pytest.raises(SystemExit, match="1"):
        start(machine)
    assert "launch.demo.estimate" in (said := capsys.readouterr().err) and "failed (no torch); run it" in said


def test_the_estimate_is_for_what_there_is_to_do(tiny: dict[str, Any], write_config: Callable[..., str]) -> None:
    stages = shipped().stages(2, 29123)
    assert sum(stage.start for stage in stages) == pytest.approx(1)
    assert [stage.tokens for stage in stages] == [0, 0, 270 * 8 * 256, 0, 100 * 16 * 256, 0, 0]
    speed = Speed(gpus=0, python_s=0.01, tokens_per_s=1000.0)
    assert speed.demo_s(stages, 2) > speed.demo_s(stages, 4) > speed.demo_s(stages[3:], 4) > 0
    found = measure(load_run(write_config(tiny)), ranks=2)
    assert found.python_s > 0 and found.tokens_per_s > 0


@pytest.mark.parametrize(("seconds", "said"), [(2, "10 s"), (50, "50 s"), (118, "2 min"), (161, "2 min 40 s")])
def test_minutes(seconds: float, said: str) -> None:
    assert demo._minutes(seconds) == said
