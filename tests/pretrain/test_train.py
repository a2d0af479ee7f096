"""The command itself, in real processes: it finishes, resumes bit by bit, stops when asked, survives kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.breakage import hold_in_save, let_a_minute_pass_a_step, lose_the_terminal
from tests.launching import run, start
from tests.logged import figures_of, lines_of
from tests.ranks import Processes, Ranks
from trainer.exit_status import EXIT_MISTAKE

TRAIN = "pretrain.train"


def _wait_for(path: Path, timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.002)


def test_two_ranks_finish_and_leave_a_run_folder_that_can_be_run_again(tiny, write_config):
    run_dir = Path(tiny["train"]["run_dir"])
    tiny["train"]["log"]["images"] = True
    done = run(TRAIN, write_config(tiny), processes=2, launcher="torchrun")
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"run folder       {run_dir}" in done.stdout and "against a target of 0.500" in done.stdout
    assert "FutureWarning" not in done.stdout and "Traceback" not in done.stdout

    steps = figures_of(str(run_dir))
    assert sorted(steps) == [0, 1, 2, 3, 4]
    assert steps[4]["validation/code/loss"] < steps[0]["validation/code/loss"]
    assert 0 < steps[4]["flops/executed_per_token"] < steps[4]["flops/dense_per_token"]
    assert list((run_dir / "tensorboard").glob("events*")) and (run_dir / "routing.png").stat().st_size > 10_000
    for rank in (0, 1):
        beat = json.loads((run_dir / f"heartbeat/rank-{rank}.json").read_text())
        assert (beat["step"], beat["phase"]) == (4, "ended")
    manifest = json.loads((run_dir / "checkpoints/step-00000004/manifest.json").read_text())
    assert manifest["world_size"] == 2 and "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt" in manifest["files"]

    again = run(TRAIN, str(run_dir / "config.yaml"), f"train.run_dir={run_dir}-2", processes=2)
    assert again.returncode == 0, again.stdout[-3000:]
    assert figures_of(f"{run_dir}-2") == steps


@pytest.mark.parametrize("stage", [2, 3])
def test_fourteen_steps_are_seven_and_a_kill_and_seven_more_bit_by_bit(tiny, write_config, stage):
    """Invariant 6, with two micro-batches a step, an adaptive budget, annealed noise, exploration, and a mixture's
    border in the second half."""
    tiny["train"] |= {"steps": 14, "checkpoint": {"every_steps": 7}, "evaluation": {"every_steps": 7, "samples": 5}}
    tiny["model"]["router"]["budget"] = {"controller": "adaptive", "dense_until": 0.1, "reach_by": 0.4}
    tiny["model"]["router"]["explore"] = 0.3
    parts = (("main", 0), ("end", 0.6))
    tiny["data"]["stages"] = [{"name": name, "from_share": start, "weights": {"code": 1}} for name, start in parts]
    tiny["deepspeed"]["zero_stage"] = stage
    config, run_dir = write_config(tiny), tiny["train"]["run_dir"]
    straight = run(TRAIN, config, f"train.run_dir={run_dir}-straight", processes=2)
    assert straight.returncode == 0, straight.stdout[-3000:]

    with Ranks(config) as ranks:
        ranks.wait_until((Path(run_dir) / "checkpoints/step-00000007/manifest.json").exists)
        ranks.kill()
    refused = run(TRAIN, config, processes=1)
    assert refused.returncode == EXIT_MISTAKE and "already holds step-00000007" in refused.stdout

    resumed = run(TRAIN, config, "train.checkpoint.resume=required", processes=2)
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    assert "at step 7" in resumed.stdout
    one, other = figures_of(f"{run_dir}-straight"), figures_of(run_dir)
    assert sorted(one) == list(range(15)) and [one[step]["data/stage"] for step in (8, 9)] == [0, 1]
    assert other == one
    if stage == 3:
        _goes_on_alone_at_another_stage(config, Path(run_dir), one)


def _goes_on_alone_at_another_stage(config: str, run_dir: Path, one: dict[int, dict[str, Any]]) -> None:
    """The same tokens, schedules and budget; losses as far as one rank and two round alike."""
    shutil.rmtree(run_dir / "checkpoints/step-00000014")
    alone = run(TRAIN, config, "deepspeed.zero_stage=1", "train.checkpoint.resume=required")
    assert alone.returncode == 0, alone.stdout[-3000:]
    assert "step 7 (ranks 2 there and 1 here, ZeRO stage 3 there and 1 here: equal to rounding" in alone.stdout
    for step, figures in figures_of(str(run_dir)).items():
        for name, value in figures.items():
            close = one[step][name] if value is None else pytest.approx(one[step][name], rel=1e-4, abs=1e-6)
            assert value == close, (step, name)


def test_a_signal_is_agreed_on_saved_and_resumed_from(tiny, write_config):
    tiny["train"] |= {"steps": 2000, "log": {"every_steps": 1, "peak_tflops": 1.0, "images": False}}
    tiny["train"] |= {"checkpoint": {"every_steps": 1000}, "evaluation": {"every_steps": 1000, "samples": 2}}
    config, run_dir = write_config(tiny), Path(tiny["train"]["run_dir"])
    process = start(TRAIN, config, processes=2, launcher="deepspeed")
    _wait_for(run_dir / "heartbeat/rank-1.json")
    _wait_for(run_dir / "metrics.jsonl")
    while len(lines_of(str(run_dir))) < 4:
        time.sleep(0.05)
    beat = json.loads((run_dir / "heartbeat/rank-1.json").read_text())
    os.kill(beat["pid"], signal.SIGUSR1)  # one rank only: all must agree
    output, _ = process.communicate(timeout=180)
    saved = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert len(saved) == 1 and saved[0].startswith("step-"), output[-2000:]
    assert "asked to stop" in output and process.returncode == 75, output[-2000:]
    assert "FutureWarning" not in output and "Traceback" not in output

    step = int(saved[0][5:])
    more = [f"train.steps={step + 2}", "train.checkpoint.resume=auto"]
    resumed = run(TRAIN, config, *more, processes=2)
    assert resumed.returncode == 0 and f"at step {step}" in resumed.stdout, resumed.stdout[-2000:]


def test_one_process_stops_with_the_documented_status(tiny, write_config):
    tiny["train"] |= {"steps": 2000}
    with Processes(TRAIN, write_config(tiny)) as process:
        process.wait_until((Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000002/manifest.json").exists)
        process.processes[0].terminate()
        assert process.end() == [75], process.output[-2000:]


def test_a_terminal_that_is_closed_loses_nothing(tiny, write_config):
    tiny["train"] |= {"steps": 2000, "checkpoint": {"every_steps": 1000}}
    run_dir = Path(tiny["train"]["run_dir"])
    with Processes(TRAIN, write_config(tiny), first=lose_the_terminal) as process:
        assert process.end() == [75]
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name in ("step-00000003", "step-00000004") and (saved / "manifest.json").exists()
    assert f"step {int(saved.name[5:])} is saved; go on with: " in (run_dir / "logs/rank-0.log").read_text()


def test_a_kill_in_the_middle_of_a_save_loses_nothing(tiny, write_config):
    tiny["train"] |= {"steps": 8, "evaluation": {"every_steps": 100, "samples": 2}}
    config, checkpoints = write_config(tiny), Path(tiny["train"]["run_dir"]) / "checkpoints"
    with Processes(TRAIN, config, first=hold_in_save) as process:
        process.wait_until((checkpoints / "step-00000004.partial").exists)
        process.kill()
    assert (checkpoints / "step-00000004.partial").exists() and not (checkpoints / "step-00000004").exists()
    resumed = run(TRAIN, config, "train.checkpoint.resume=auto")
    assert resumed.returncode == 0, resumed.stdout[-2000:]
    assert "skipped: step-00000004.partial was never finished" in resumed.stdout
    assert "step-00000002 at step 2" in resumed.stdout
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000006", "step-00000008"]


def test_a_torn_checkpoint_is_passed_over_and_nothing_whole_is_an_error(tiny, write_config):
    config, run_dir = write_config(tiny), Path(tiny["train"]["run_dir"])
    nothing = run(TRAIN, config, "train.checkpoint.resume=required")
    assert (
        nothing.returncode == EXIT_MISTAKE
        and "cannot resume from" in nothing.stdout
        and "no checkpoint" in nothing.stdout
    )
    assert not (run_dir / "metrics.jsonl").exists()

    assert run(TRAIN, config).returncode == 0
    weights = run_dir / "checkpoints/step-00000004/deepspeed/mp_rank_00_model_states.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # same size, one bit
    resumed = run(TRAIN, config, "train.checkpoint.resume=auto")
    assert resumed.returncode == 0 and "step-00000004 is torn" in resumed.stdout and "at step 2" in resumed.stdout

    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "trainer.pt").unlink()
    none = run(TRAIN, config, "train.checkpoint.resume=auto")
    assert none.returncode == EXIT_MISTAKE and "none of step-00000004, step-00000002 is whole" in none.stdout


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.stepz=3"], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (["model.heads=3"], "model.width (32) must be divisible by model.heads (3)"),
        (["train.global_batch_samples=7"], "must be divisible by train.micro_batch_samples"),
        (["data.dir=nowhere"], "nowhere"),
        (
            ["model.vocab_size=500", "data.tokenizer.vocab_size=500"],
            "have a vocabulary of 400, but data.tokenizer.vocab_size is 500",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_a_status_of_its_own(tiny, write_config, overrides, sentence):
    done = run(TRAIN, write_config(tiny), *overrides)
    assert done.returncode == EXIT_MISTAKE, done.stdout[-2000:]
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0], done.stdout[-2000:]
    assert "Traceback" not in done.stdout
    assert not Path(tiny["train"]["run_dir"]).exists()


def test_rank_0s_clock_says_when_a_checkpoint_is_due_and_a_resume_from_there_is_exact(tiny, write_config):
    """A minute a step on rank 0; by rank 1's clock a save would be due at every step."""
    tiny["train"] |= {"steps": 7, "checkpoint": {"every_steps": 1000, "every_minutes": 3, "keep": 9}}
    config, run_dir = write_config(tiny), Path(tiny["train"]["run_dir"])
    with Ranks(config, first=let_a_minute_pass_a_step) as ranks:
        assert ranks.end() == [0, 0], ranks.output[-3000:]
    saved = sorted((run_dir / "checkpoints").iterdir())
    assert [folder.name for folder in saved] == ["step-00000003", "step-00000006", "step-00000007"]
    straight = figures_of(str(run_dir))
    for later in saved[1:]:
        shutil.rmtree(later)
    resumed = run(TRAIN, config, "train.checkpoint.resume=required", processes=2)
    assert resumed.returncode == 0 and "at step 3" in resumed.stdout, resumed.stdout[-3000:]
    assert figures_of(str(run_dir)) == straight


def test_a_finished_run_says_so(tiny, write_config):
    config = write_config(tiny)
    assert run(TRAIN, config).returncode == 0
    for fewer, field in (("train.steps=3", "train.steps (3)"), ("train.stop_at_step=1", "train.stop_at_step (1)")):
        again = run(TRAIN, config, "train.checkpoint.resume=auto", fewer)
        assert again.returncode == 0 and f"the run is at step 4 already; raise {field}" in again.stdout


def test_a_port_that_is_taken_is_one_sentence(tiny, write_config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = run(TRAIN, write_config(tiny), variables=one_rank)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert f"the ranks cannot meet at 127.0.0.1:{port}" in done.stdout and "--master_port N" in done.stdout


def test_ctrl_c_saves_and_stops(tiny, write_config):
    tiny["train"] |= {"steps": 2000}
    with Processes(TRAIN, write_config(tiny)) as process:
        process.wait_until((Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000002/manifest.json").exists)
        os.kill(int(process.processes[0].pid or 0), signal.SIGINT)
        assert process.end() == [75] and "Traceback" not in process.output, process.output[-2000:]
