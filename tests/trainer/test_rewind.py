"""A run that went wrong is taken back, passes over what it stumbled on, and is then as if it had never met it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data.batches import Batch, TrainingData
from data.skip_ranges import refuse_other_past
from launch import rewind
from launch.rewind import go_back
from tests.trainer.checkpoints.test_resume import fake
from trainer.checkpoints.read_weights import checkpoint_of
from trainer.exit_status import EXIT_MISTAKE
from trainer.heartbeat import Heartbeat
from trainer.monitor.spikes import Spike, how_to_go_back

Train = Callable[..., int]
POISON = (17 * 8, 20 * 8)  # the samples of steps 18 to 20


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps' samples of which the targets make no sense."""
    take = TrainingData.batch

    def batch(self: TrainingData, consumed: Sequence[int] | range) -> Batch:
        taken = take(self, consumed)
        bad = (taken.sample_ids >= POISON[0]) & (taken.sample_ids < POISON[1])
        taken.targets[bad] = 399
        return taken

    monkeypatch.setattr(TrainingData, "batch", batch)


@pytest.fixture
def long_run(tiny: dict[str, Any]) -> dict[str, Any]:
    """24 steps, a checkpoint every 3, a window that is full after 10 steps."""
    tiny["train"] |= {
        "steps": 24,
        "micro_batch_samples": 8,
        "optimizer": {"lr": 0.006},
        "spike": {"window_steps": 10, "threshold": 12.0},
        "log": {"every_steps": 1, "peak_tflops": 1.0, "images": False},
        "checkpoint": {"every_steps": 3, "keep": 20},
        "evaluation": {"every_steps": 24, "samples": 5},
    }
    return tiny


def _metrics(run: Path) -> list[dict[str, Any]]:
    """All but the clock's and the memory's figures."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines]


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def _spikes(run: Path) -> list[str]:
    return re.findall(r"WARNING (spike at .*)", (run / "logs/rank-0.log").read_text())


@pytest.mark.quick
@pytest.mark.usefixtures("poisoned")
def test_a_spike_ends_the_run_which_goes_back_and_is_as_if_it_had_never_met_those_samples(
    long_run: dict[str, Any], train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the very commands that the error gives."""
    run = Path(long_run["train"]["run_dir"])
    long_run["train"]["spike"]["action"], long_run["train"]["max_bad_steps"] = "stop", 3
    assert train_here(long_run) == EXIT_MISTAKE
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.match(r"error: spike at steps 18 to 20: the (loss|gradient norm) rose to ", error)
    assert f"its samples are {POISON[0]} to {POISON[1] - 1};" in error
    assert error.endswith("; train.spike.action stop ended the run")
    assert _steps(run / "checkpoints") == [3, 6, 9, 12, 15, 18] and _metrics(run)[-1]["step"] == 20
    assert json.loads((run / "heartbeat/rank-0.json").read_text())["phase"] == "failed"
    before = (run / "metrics.jsonl").read_text().splitlines(keepends=True)

    found = re.search(r"python -m launch\.rewind (\S+ \d+), then start again with (.*?);", error)
    assert found is not None
    assert rewind.main(shlex.split(found[1])) == 0
    abandoned = run / "checkpoints/abandoned-1"
    told = capsys.readouterr().out
    assert told.startswith(f"{abandoned} now has metrics.jsonl, step-00000018; remove it") and "Step 15 is" in told
    assert _steps(abandoned) == [18] and _steps(run / "checkpoints") == [3, 6, 9, 12, 15]
    assert checkpoint_of(abandoned / "step-00000018")  # as good as any other
    later = (abandoned / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in later] == [16, 17, 18, 19, 20]
    assert (run / "metrics.jsonl").read_text().splitlines(keepends=True) + later == before

    again = found[2].split()
    assert again == ["train.checkpoint.resume=required", f"data.skip_ranges=[[{POISON[0]},{POISON[1]}]]"]
    assert train_here(long_run, *again) == 0
    assert _steps(run / "checkpoints") == [3, 6, 9, 12, 15, 18, 21, 24]

    never_met = tmp_path / "never-met"
    assert train_here(long_run, again[1], f"train.run_dir={never_met}") == 0
    assert _metrics(run) == _metrics(never_met)
    assert _metrics(run)[-1]["step"] == 24 and _spikes(never_met) == []

    # A later start must know of the range, too; and one cannot pass over what was trained on.
    forgets = ["train.steps=26", "train.checkpoint.resume=auto"]
    capsys.readouterr()
    assert train_here(long_run, *forgets) == EXIT_MISTAKE
    assert (
        f"and skipped [[{POISON[0]}, {POISON[1]}]] before it, but data.skip_ranges now says []"
        in capsys.readouterr().err
    )
    assert train_here(long_run, *forgets, f"data.skip_ranges=[[0,8],[{POISON[0]},{POISON[1]}]]") == EXIT_MISTAKE
    assert f"keep those ranges and only add ones from {24 * 8 + 24} on" in capsys.readouterr().err
    assert train_here(long_run, *forgets, f"data.skip_ranges=[[{POISON[0]},{POISON[1]}],[216,224]]") == 0


@pytest.mark.usefixtures("poisoned")
def test_a_resume_in_the_middle_of_a_spike_tells_and_logs_the_same(
    long_run: dict[str, Any], train_here: Train, tmp_path: Path
) -> None:
    """Invariant 6 for the detector: killed after step 21, gone on from 18, the first step of the spike."""
    straight, cut = Path(long_run["train"]["run_dir"]), tmp_path / "cut"
    assert train_here(long_run) == 0
    begun, over = _spikes(straight)
    assert begun.startswith("spike at step 18: ") and over.startswith("spike at steps 18 to 20, which is over: ")
    assert "launch.rewind" in begun and over.endswith(f"data.skip_ranges=[[{POISON[0]},{POISON[1]}]]")
    shutil.copytree(straight, cut)
    for step in (21, 24):
        shutil.rmtree(cut / f"checkpoints/step-{step:08d}")
    (cut / "logs/rank-0.log").unlink()
    assert train_here(long_run, "train.checkpoint.resume=required", f"train.run_dir={cut}") == 0
    assert _metrics(cut) == _metrics(straight)
    assert _spikes(cut) == [over.replace(str(straight), str(cut))]


def test_another_seed_is_refused_until_it_is_accepted_and_then_once_is_enough(
    tiny: dict[str, Any], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(tiny["train"]["run_dir"])
    tiny["train"] |= {"evaluation": {"every_steps": 100, "samples": 2}, "micro_batch_samples": 8}
    assert train_here(tiny, "data.skip_ranges=[[8,16]]") == 0
    go_back(run, 2)
    other = ["data.seed=7", "train.checkpoint.resume=required"]  # whose numbers are others', so no range is missed
    capsys.readouterr()
    assert train_here(tiny, *other) == EXIT_MISTAKE
    error = capsys.readouterr().err
    accept = re.search(r"or set (train\.checkpoint\.accept_data=[0-9a-f]{12}) to go on with the other data", error)
    assert accept is not None and "added to data.stages from the checkpoint's token on" in error
    wrong = accept[1][:-1] + ("0" if accept[1][-1] != "0" else "1")
    assert train_here(tiny, *other, wrong) == EXIT_MISTAKE
    assert train_here(tiny, *other, accept[1]) == 0
    assert (run / "checkpoints/abandoned-1/step-00000004").is_dir()
    assert train_here(tiny, *other, "train.steps=6") == 0
    assert [line["step"] for line in _metrics(run) if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert (
        train_here(tiny, "train.checkpoint.resume=required", "train.steps=8") == EXIT_MISTAKE
    )  # the first seed is now the other
    assert "was trained on other data or another order" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 2, 4 and 6, and lines up to 7."""
    made = tmp_path / "a run"
    for step in (2, 4, 6):
        fake(made / "checkpoints", step)
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 8)]
    (made / "metrics.jsonl").write_text("".join(lines) + '{"step": 8, "tr')
    (made / "heartbeat").mkdir()
    return made


@pytest.mark.parametrize(
    ("step", "damage", "sentence"),
    [
        (5, None, "has no checkpoint of step 5; give one of the steps found there: 2, 4, 6"),
        (4, "deepspeed/weights.pt", "step-00000004 is torn: deepspeed/weights.pt is missing; give another"),
    ],
)
def test_a_checkpoint_that_is_not_there_or_torn_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], step: int, damage: str | None, sentence: str
) -> None:
    if damage:
        (run / f"checkpoints/step-{step:08d}" / damage).unlink()
    everything = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        rewind.main([str(run), str(step)])
    assert end.value.code == 1 and sentence in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == everything


@pytest.mark.parametrize(
    ("given", "hint"),
    [("checkpoints/step-00000004", "here RUN"), ("heartbeat", "runs/my\n"), ("..", "; RUN/.. holds a run\n")],
)
def test_another_folder_than_the_runs_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], given: str, hint: str
) -> None:
    with pytest.raises(SystemExit) as end:
        rewind.main([str(run / given), "4"])
    sentence = f"{run / given} is not a run folder: it has no checkpoints; give the folder that train.run_dir names"
    error = capsys.readouterr().err
    assert end.value.code == 1 and sentence in error and hint.replace("RUN", str(run)) in error


def test_a_run_that_is_going_on_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that moves while one looks; one that does not is of a run that was killed."""
    heartbeat = Heartbeat(run / "heartbeat", 0)
    heartbeat.note(6, "training")
    heartbeat.write()
    monkeypatch.setattr(time, "sleep", lambda seconds: heartbeat.write())
    with pytest.raises(
        ValueError, match=rf"still running: rank 0 \(process {os.getpid()} on .* is training at step 6; stop"
    ):
        go_back(run, 2)
    (run / "heartbeat/rank-1.json").write_text("")  # cut by a full disk: says nothing
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert go_back(run, 4) is not None
    heartbeat.note(4, "ended")
    heartbeat.write()
    assert go_back(run, 2) is not None


def test_going_back_twice_makes_two_folders_and_a_third_time_none(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = go_back(run, 4), go_back(run, 2)
    assert first is not None and second is not None
    assert (first.name, second.name) == ("abandoned-1", "abandoned-2")
    assert (_steps(first), _steps(second), _steps(run / "checkpoints")) == ([6], [4], [2])
    steps = [[line["step"] for line in _metrics(folder)] for folder in (run, second, first)]
    assert steps == [[1, 2], [3, 4], [5, 6, 7]]
    assert rewind.main([str(run), "2"]) == 0
    assert "nothing was done after step 2" in capsys.readouterr().out and not (first.parent / "abandoned-3").exists()


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_kill_while_it_moves_loses_nothing(run: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    """Before the first move, between the two, and before the metrics are cut; then once more to the end."""
    rename, moved = Path.rename, []

    def move(self: Path, target: Path) -> Path:
        if len(moved) == killed_at:
            raise KeyboardInterrupt
        if self.parent.name == "checkpoints":
            moved.append(self.name)
        return rename(self, target)

    def cut(path: Path, content: bytes) -> None:
        if path.parent == run:
            raise KeyboardInterrupt
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", move)
        patch.setattr("launch.rewind.write_atomically", cut)
        with pytest.raises(KeyboardInterrupt):
            go_back(run, 2)
    assert moved == ["step-00000004", "step-00000006"][:killed_at]
    assert [line["step"] for line in _metrics_of_text(run)] == list(range(1, 8))
    go_back(run, 2)
    assert _steps(run / "checkpoints") == [2] and [line["step"] for line in _metrics(run)] == [1, 2]
    assert sorted(path.name for path in run.glob("checkpoints/abandoned-*/step-*")) == [
        "step-00000004",
        "step-00000006",
    ]
    for folder in run.glob("checkpoints/abandoned-*"):
        assert [line["step"] for line in _metrics(folder)] == [3, 4, 5, 6, 7]


def _metrics_of_text(run: Path) -> list[dict[str, Any]]:
    """Without the line that was cut in half."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:7]]


def test_the_way_back_keeps_the_ranges_that_were_there(run: Path) -> None:
    spike = Spike(5, 5, 1, 32, 40, "")
    quoted = f"python -m launch.rewind '{run}' 4, then"

    def ranges(*there: tuple[int, int]) -> str:
        told = how_to_go_back(run, spike, there)
        assert quoted in told
        return told.partition("data.skip_ranges=")[2]

    assert ranges() == "[[32,40]]"
    assert ranges((0, 10)) == "[[0,10],[42,50]]"
    assert ranges((34, 36), (90, 95)) == "[[32,42],[90,95]]"  # one that lies within is swallowed
    with_first = Spike(2, 5, 4, 8, 40, "")
    assert "no checkpoint from before it is left to go back to" in how_to_go_back(run, with_first, [])


@pytest.mark.parametrize(
    ("then", "now", "consumed", "fine"),
    [
        ([], [], 0, True),
        ([], [(0, 5)], 0, True),
        ([(3, 5)], [], 3, True),  # has not come there yet
        ([(3, 5)], [], 4, False),
        ([(3, 5)], [(3, 5)], 4, True),
        ([(3, 5)], [(3, 5), (6, 9)], 4, True),
        ([(3, 5)], [(3, 5), (5, 9)], 4, False),  # sample 5 was trained on
        ([], [(8, 9)], 8, True),
        ([], [(7, 9)], 8, False),
    ],
)
def test_what_lies_behind_must_stay_as_it_was(then: Any, now: Any, consumed: int, fine: bool) -> None:
    if fine:
        refuse_other_past(then, now, consumed)
        return
    with pytest.raises(ValueError, match=r"keep those ranges and only add ones from \d on"):
        refuse_other_past(then, now, consumed)
