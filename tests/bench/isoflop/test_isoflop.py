"""The suite's command: what is missing is run, what is done is not, failures are reported; a real suite at toy size."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.common import jobs
from bench.isoflop import runs as suite_runs
from bench.isoflop.__main__ import main
from launch.slurm.__main__ import main as submit
from tests.bench.commands import in_place_of_commands
from tests.bench.isoflop.suites import DENSE, finish, planned, write_dial, write_suite
from tests.launching import run_command
from tests.ranks import ensure_server
from tests.trainer.checkpoints.test_mirror import until
from trainer.sessions import SignalLog

Calls = list[list[str]]


def _replace(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Have the suite call ``run``, as if it were ``subprocess.run``, and nobody else."""
    in_place_of_commands(monkeypatch, run)
    monkeypatch.setattr(suite_runs, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def suite(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dense and learned skip, two seeds; what a run of it may not read or write lies elsewhere."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return write_suite(tmp_path, tiny, seeds=[0, 1])


@pytest.fixture
def calls(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Commands in place of which ``act`` of their words is done, which is their exit status; by default all succeed."""
    made: Calls = []
    _, runs = planned(suite, tmp_path / "out")

    def run(command: list[str], stdout: Any = None, **options: Any) -> Any:
        made.append(command)
        words = " ".join(command)
        for status, what in ((1, "fails"), (75, "stops")):
            if f"train.optimizer.lr={status}" in words:
                stdout.write(f"first\nerror: it {what}\n[launcher] exits with {status}\n".encode())
                return SimpleNamespace(returncode=status)
        for one in runs:
            if "pretrain.train" in command and f'"{one.folder}"' in words:
                finish(one, [6.0, 4.0 - one.seed])
            if "evals.dial" in command and str(one.folder) in command:
                write_dial(one)
        return SimpleNamespace(returncode=0)

    _replace(monkeypatch, run)
    return made


def _names(calls: Calls) -> list[str]:
    """Module and run of every command."""
    found = []
    for call in calls:
        module = next(word for word in call if word.startswith(("pretrain.", "evals.", "data.", "launch.")))
        folder = next((w for w in call if w.startswith("train.run_dir=")), call[call.index(module) + 1]).strip('"')
        found.append(f"{module} {Path(folder).name}")
    return found


ALL = [f"pretrain.train {variant}-seed{seed}" for seed in (0, 1) for variant in ("dense", "skip")]


def test_a_real_suite_from_start_to_tables(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("MASTER_PORT", "29500")  # as DeepSpeed leaves it: two runs at once must not meet there
    path, out = write_suite(tmp_path, tiny, set={"train.checkpoint.background": False}), tmp_path / "out"
    ensure_server()  # before threads start runs
    _replace(monkeypatch, run_command)
    assert main([str(path), "--out", str(out)]) == 0
    for name in ("results.md", "results.csv", "suite.yaml", "loss.png", "density.png", "dial.png"):
        assert (out / name).stat().st_size > 0, name
    told = capsys.readouterr().out
    assert "0 of 2 runs are done already" in told and "2 of 2 runs are done; wrote results.md" in told
    page = (out / "results.md").read_text()
    assert f"`python -m bench.isoflop {path} --out {out}`" in page and f"torch {torch.__version__} here" in page

    header, *lines = [line.split(",") for line in (out / "results.csv").read_text().splitlines()]
    dense, skip = (dict(zip(header, line, strict=True)) for line in lines)
    _, runs = planned(path, out)
    assert float(dense["flops"]) == pytest.approx(runs[0].planned_flops, rel=1e-9)  # what was planned is what was done
    logged = [json.loads(line) for line in (runs[1].folder / "metrics.jsonl").read_text().splitlines()]
    per_token = [line["flops/executed_per_token"] for line in logged if "train/loss" in line]  # one line a step
    assert len(per_token) == 4 and float(skip["flops"]) == pytest.approx(256 * sum(per_token), rel=1e-9)
    last = logged[-1]
    assert skip["loss/code"] == repr(last["validation/code/loss"]) and skip["tokens"] == "1024"
    assert float(skip["density"]) == last["validation/code/density"] and float(skip["time/tokens_per_s"]) > 0

    _replace(monkeypatch, lambda *_, **__: pytest.fail("it was run already"))
    assert main([str(path), "--out", str(out), "--against", str(out)]) == 0
    assert "they are the same" in capsys.readouterr().out
    text = (out / "results.csv").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.csv").write_text(text.replace(skip["loss/code"], "1.0"))
    with pytest.raises(SystemExit) as ended:
        main([str(path), "--out", str(out), "--table", "--against", str(other)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: loss/code of skip with seed 0 differs from ")


def test_seeds_go_outermost_and_what_is_done_is_left_alone(suite: Path, calls: Calls, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main([str(suite), "--out", out, "--jobs", "1", "--only", "dense", "--seeds", "1"]) == 0
    assert _names(calls) == [ALL[2]]
    calls.clear()
    assert main([str(suite), "--out", out, "--jobs", "1"]) == 0
    assert _names(calls) == [ALL[0], ALL[1], ALL[3], "evals.dial skip-seed0"]  # the dial of the first seed only
    calls.clear()
    assert main([str(suite), "--out", out]) == 0 == main([str(suite), "--out", out, "--table"])
    assert calls == []
    _, runs = planned(suite, tmp_path / "out")
    (runs[3].folder / "metrics.jsonl").write_text('{"step": 2, "validation/code/loss": 5.0}\n')  # cut on its way
    assert main([str(suite), "--out", out]) == 0
    assert _names(calls) == [ALL[3]] and 'train.checkpoint.resume="auto"' in calls[0]


def test_a_failure_is_told_and_the_others_go_on(
    suite: Path, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = [str(suite), "variants.dense.set.train.optimizer.lr=1.0", "--out", str(out), "--jobs", "1"]
    assert main(base) == 1
    assert _names(calls) == [*ALL, "evals.dial skip-seed0"]
    told = capsys.readouterr()
    log = out / "logs/dense-seed0.log"
    assert f"dense-seed0: error: it fails (all that it printed: {log})\ndense-seed1: error: it fails" in told.err
    assert log.read_text().startswith("first\n") and "2 of 4 runs are done" in told.out
    assert "| dense | - | - |" in (out / "results.md").read_text()


def test_a_run_that_was_stopped_is_not_done(
    suite: Path, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(suite), "variants.dense.set.train.optimizer.lr=75", "--out", str(tmp_path / "out"), "--seeds", "0"]
    assert main(words) == 1
    assert (
        "dense-seed0: it was asked to stop and has saved; the same command goes on with it" in capsys.readouterr().err
    )
    calls.clear()
    assert main(words) == 1 and _names(calls) == [ALL[0]]


def test_missing_data_is_prepared_first(tiny: dict[str, Any], suite: Path, calls: Calls, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "elsewhere"), "--only", "dense", "--seeds", "0"]
    assert main([str(suite), f"set.data.dir={tmp_path / 'data'}", *out]) == 0
    backbone = str(tmp_path / "backbone.yaml")
    assert [call[2:4] for call in calls[:2]] == [["data.tokenizer", backbone], ["data.prepare", backbone]]
    assert f'data.dir="{tmp_path / "data"}"' in calls[0]


def test_data_that_cannot_be_prepared_ends_it(suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """For real: the tokenizer's own sentence, then ours."""
    words = [str(suite), f"set.data.dir={tmp_path / 'data'}", "--out", str(tmp_path / "out")]
    _ended(capfd, "model.vocab_size (400) must equal", [*words, "set.data.tokenizer.vocab_size=300"])
    nothing = [*words, "set.data.sources=[{name: code, files: [/no/such]}]"]
    said = _ended(capfd, "the suite's data cannot be prepared: python -m data.tokenizer", nothing)
    assert "/no/such" in said


def _ended(capture: Any, said: str, words: list[str]) -> str:
    """It ends with status 1 and a sentence; all that was printed to stderr."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    text = str(capture.readouterr().err)
    assert said in text and "Traceback" not in text
    return text


def test_ranks_start_under_deepspeed_with_ports_of_their_own(suite: Path, calls: Calls, tmp_path: Path) -> None:
    assert main([str(suite), "--out", str(tmp_path / "out"), "--ranks", "2", "--only", "skip"]) == 0
    first, second, measurement = calls
    for call in (first, second):
        assert Path(call[0]).name == "deepspeed" and call[call.index("--num_gpus") + 1] == "2"
        assert call[call.index("--module") + 1 : call.index("--module") + 3] == [
            "pretrain.train", str(tmp_path / "backbone.yaml")
        ]  # fmt: skip
    ports = [call[call.index("--master_port") + 1] for call in (first, second)]
    assert all(int(port) >= 1024 for port in ports) and measurement[1:3] == ["-m", "evals.dial"]


def test_a_job_sees_its_gpus_only(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "device_sets", lambda at_once, ranks: ["6,7" if ranks > 1 else "3"])
    seen: list[tuple[list[str], str | None]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append((command, env.get("CUDA_VISIBLE_DEVICES")))
        return SimpleNamespace(returncode=0)

    _replace(monkeypatch, run)
    for ranks in ("1", "2"):
        main(
            [
                str(suite),
                "--only",
                "dense",
                "--seeds",
                "0",
                "--out",
                str(tmp_path / "out"),
                "--jobs",
                "1",
                "--ranks",
                ranks,
            ]
        )
    (one, devices), (two, hidden) = seen
    assert devices == "3" and "--include" not in one
    assert hidden is None and two[two.index("--include") + 1] == "localhost:6,7" and "--num_gpus" not in two


def test_every_run_that_is_not_done_is_submitted(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To SLURM's own command, which prints its scripts and refuses a rank too many."""
    commands: Calls = []

    def run(command: list[str], check: bool) -> Any:
        commands.append(command)
        try:
            return SimpleNamespace(returncode=submit(command[3:]))
        except SystemExit as ended:
            return SimpleNamespace(returncode=ended.code)

    _replace(monkeypatch, run)
    out, site = tmp_path / "out", tmp_path / "site.yaml"
    site.write_text("{partition: cpu}")
    finish(planned(suite, out)[1][0], [5.0, 4.0])
    slurm = ["--slurm", "--tasks-per-node", "2", "--site", str(site), "--dry-run"]
    assert main([str(suite), "--out", str(out), *slurm]) == 0
    told = capsys.readouterr().out
    assert "1 of 4 runs are done, 0 submitted" in told
    assert f"when they are done: python -m bench.isoflop {suite} --out {out}\n" in told
    assert _names(commands) == [name.replace("pretrain.train", "launch.slurm") for name in ALL[1:]]
    assert told.count("#SBATCH --ntasks-per-node=2") == 3 and "train.seed=1" in told and "job-name=skip-seed1" in told
    assert sorted(p.name for p in (out / "runs").iterdir()) == ["dense-seed0"] and not (out / "results.md").exists()

    assert main([str(suite), "--out", str(out), "--slurm", "--tasks-per-node", "3", "--site", str(site)]) == 1
    told_wrong = capsys.readouterr()
    assert "must be divisible by micro_batch_samples x ranks (2 x 3 = 6)" in told_wrong.err
    assert "skip-seed0: not submitted, see above" in told_wrong.err and "0 submitted" in told_wrong.out


def test_downstream_tasks_of_finished_runs(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each setting, and not for a router that looks ahead."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    variants = {"dense": {"set": DENSE}, "choice": {"set": {"model.router.kind": "expert_choice"}}}
    asked = {"tasks": ["blimp", "perplexity"], "data": str(tmp_path), "limit": 3}
    path = write_suite(tmp_path, tiny, variants=variants, downstream=asked)
    out = tmp_path / "out"
    _, runs = planned(path, out)
    commands: Calls = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        metrics = {"blimp_a": {"acc": 0.25}, "blimp_b": {"acc": 0.5}, "perplexity": {"bits_per_byte": 3.0}}
        content = {"ours": {"metrics": metrics, "loglikelihoods": {"blimp_a": [1.0]}}}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(content))
        return SimpleNamespace(returncode=0)

    _replace(monkeypatch, run)
    for one in runs:
        finish(one, [5.0, 4.0])
    words = [str(path), "--out", str(out)]
    assert main(words) == 0 == main(words)
    (command,) = commands
    folder = runs[0].folder
    assert command[1:] == [
        "-m", "evals.harness", str(folder), "--tasks", "blimp", "perplexity", "--data", str(tmp_path),
        "--json", str(folder / "harness.json"), "--limit", "3",
    ]  # fmt: skip
    assert "loglikelihoods" not in (folder / "harness.json").read_text()
    assert "| 0.3750 | 3.0000 |" in (out / "results.md").read_text()
    assert main([*words, "downstream.limit=4"]) == 0 and len(commands) == 2


MISTAKES: dict[str, tuple[list[str], str]] = {
    "jobs": (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    "variant": (["--only", "skp"], "--only: the suite has no variant 'skp'; did you mean 'skip'?"),
    "no variant": (["--only", "zzz"], "the suite has no variant 'zzz'; there are: dense, skip"),
    "seeds": (["--seeds", "7"], "--seeds leaves no run; the suite's seeds are 0, 1, and seeds=[...] sets others"),
    "override": (["tokns=5"], "unknown key 'tokns'; did you mean 'tokens'?"),
    "ranks": (["--ranks", "3"], "variant dense: train.global_batch_samples (8) must be divisible by"),
    "table": (["--table"], "no run of the suite is done below"),
    "downstream": (["downstream={tasks: [blimp], data: /no/such}"], "downstream.data /no/such is not a folder"),
    "against": (["--against", "/no/such", "--only", "dense"], "there is no /no/such/results.csv"),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(
    suite: Path, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    text = _ended(capsys, said, [str(suite), *words, "--out", str(tmp_path / "out")])
    assert text.splitlines()[-1].startswith("error: ")


def test_a_harness_that_is_not_installed_is_told(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = [f"downstream={{tasks: [blimp], data: {tmp_path}}}", "--out", str(tmp_path / "out")]
    _ended(capsys, "lm_eval is not installed; install it with", [str(suite), *words])


def test_auto_is_what_each_runs_machine_made_of_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["train"]["precision"] = "auto"
    path, out = write_suite(tmp_path, tiny), tmp_path / "out"
    _, runs = planned(path, out)
    for run, precision in zip(runs, ("fp32", "bf16"), strict=True):
        finish(run, [5.0, 4.0])
        written = (run.folder / "config.yaml").read_text()
        (run.folder / "config.yaml").write_text(written.replace("precision: auto", f"precision: {precision}"))
    assert main([str(path), "--table", "--out", str(out)]) == 0
    assert "* trained in bf16 and fp32\n" in (out / "results.md").read_text()


def test_a_folder_with_another_run_ends_it_before_anything_runs(
    suite: Path, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    finish(planned(suite, out)[1][1], [5.0, 4.0])
    said = (
        "skip-seed0 holds a run with another config: train.clip_norm 1.0 instead of 0.5; remove the folder, or choose"
    )
    _ended(capsys, said, [str(suite), "set.train.clip_norm=0.5", "--out", str(out)])
    assert calls == []


def test_two_commands_do_not_share_a_folder(
    suite: Path, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.files import only_writer

    out = tmp_path / "out"
    out.mkdir()
    with only_writer(out):
        _ended(capsys, f"another command is writing to {out}", [str(suite), "--out", str(out)])
    assert calls == []


def test_ctrl_c_starts_no_further_run(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: Calls = []
    signals: list[int] = []
    note = SignalLog.note

    def noted(log: SignalLog, number: int, frame: Any) -> None:
        note(log, number, frame)
        signals.append(number)

    def run(command: list[str], **_: Any) -> Any:
        started.append(command)
        os.kill(os.getpid(), signal.SIGINT)  # to the process, whose main thread wakes, as Ctrl-C does
        until(lambda: signals)
        return SimpleNamespace(returncode=75)

    monkeypatch.setattr(SignalLog, "note", noted)
    _replace(monkeypatch, run)
    with pytest.raises(SystemExit) as ended:
        main([str(suite), "--out", str(tmp_path / "out"), "--jobs", "1"])
    assert ended.value.code == 130 and len(started) == 1
    assert "interrupted" in capsys.readouterr().err
