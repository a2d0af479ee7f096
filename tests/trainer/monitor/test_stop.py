"""Signals are remembered, and a run that only goes wrong is ended with what one needs to go on."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.skip_ranges import sample_ids
from model.flops import Routed
from trainer.checkpoints import manifest
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.exit_status import EXIT_MISTAKE
from trainer.monitor.step_checks import StepChecks
from trainer.monitor.stop import StopRequest, bad_step, too_many_bad_steps
from trainer.tally import StepResult, Tally
from trainer.trainer import Trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_only_sets_a_flag(train_here: Any, number: int) -> None:
    """``train_here`` puts the handlers of the test's process back."""
    signal.signal(number, signal.SIG_DFL)  # nohup, by which the tests may have been started, ignores one
    stop = StopRequest()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested and not stop.request()


def test_nohup_is_respected(train_here: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested and stop.request()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_sentence_names_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    assert "after" not in too_many_bad_steps(3, 17, tmp_path)
    assert "no earlier checkpoint was written" in too_many_bad_steps(3, 17, tmp_path)
    (tmp_path / "step-00000010").mkdir()
    sentence = too_many_bad_steps(3, 17, tmp_path)
    assert sentence.startswith("3 steps in a row up to step 17 had a loss or gradient that is not finite")
    assert "train.max_bad_steps" in sentence and sentence.endswith("the newest checkpoint is step-00000010")


def test_a_run_that_blows_up_ends_with_the_steps_samples_and_a_whole_checkpoint(
    tiny: dict[str, Any], world: World, train_here: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """One step at a huge rate, after a good checkpoint; the weights then give no finite loss any more."""
    run_dir = Path(tiny["train"]["run_dir"])
    assert train_here(tiny, "train.steps=2") == 0
    capsys.readouterr()
    blow_up = ["train.optimizer.lr=1e38", "train.clip_norm=0", "train.max_bad_steps=3", "train.steps=20"]
    assert (
        train_here(tiny, *blow_up, "train.checkpoint.resume=required", "train.checkpoint.every_steps=100")
        == EXIT_MISTAKE
    )
    told = capsys.readouterr()

    bad = re.findall(r"step (\d+): the loss was not finite on rank 0 \(its samples ([\d, ]+)\)", told.out)
    assert bad == [(str(s), ", ".join(str(i) for i in range(8 * s - 8, 8 * s))) for s in (4, 5, 6)]
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "3 steps in a row up to step 6" in errors[0]
    assert errors[0].endswith("the newest checkpoint is step-00000002")
    assert manifest.newest_whole(run_dir / "checkpoints", world) == (run_dir / "checkpoints/step-00000002", [])
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    skipped = {r["step"]: (r["train/skipped_steps"], r["train/loss"]) for r in logged if "train/loss" in r}
    assert [skipped[step] for step in (4, 5, 6)] == [(1, None)] * 3 and skipped[3][0] == 0
    assert "step 6" in (run_dir / "logs/rank-0.log").read_text()
    assert json.loads((run_dir / "heartbeat/rank-0.json").read_text())["phase"] == "failed"

    # A lower rate, as the sentence advises, and the run goes on from there.
    assert train_here(tiny, "train.steps=4", "train.checkpoint.resume=required") == 0
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and last["validation/code/loss"] < 6.0


def test_good_steps_in_between_start_the_count_again(
    tiny: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bad, one good, two bad: never three in a row."""
    end_step = Trainer.end_step
    seen: list[bool] = []

    def some_bad(self: Any, result: StepResult, lr: float, waited_s: float) -> None:
        seen.append(len(seen) not in (2, 5))
        end_step(self, StepResult(result.tally, result.penalty, None, not seen[-1], []), lr, waited_s)

    monkeypatch.setattr(Trainer, "end_step", some_bad)
    tiny["train"] |= {"max_bad_steps": 3, "checkpoint": {"every_steps": 100}, "evaluation": {"every_steps": 100}}
    assert train_here(tiny, "train.steps=6") == 0
    assert seen == [True, True, False, True, True, False]
    assert train_here(tiny, "train.steps=9", "train.checkpoint.resume=required") == EXIT_MISTAKE


@pytest.mark.parametrize(("bad_ranks", "ends"), [([], False), ([(0, [1])], True)])
def test_in_fp16_only_a_bad_loss_counts(configure: Callable[..., PretrainConfig], bad_ranks: Any, ends: bool) -> None:
    """A gradient that overflows there is how the loss scale is found."""
    checks = StepChecks(configure("train.precision=fp16", "train.max_bad_steps=2"), Path("run"))
    tally = Tally(1.0, 0.0, 1, 0, Routed(1, 1, [], []), 0, [])
    result = StepResult(tally, 0.0, None, False, bad_ranks)
    size = checks._config.train.global_batch_samples
    first, second = checks.judge(1, size, result), checks.judge(2, 2 * size, result)
    assert first.error is None and bool(first.warning) == ends
    assert (second.error is not None and "2 steps in a row up to step 2" in second.error()) == ends


def test_ctrl_c_is_answered_at_once_and_the_second_ends(capfd: pytest.CaptureFixture[str]) -> None:
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    }
    try:
        stop = StopRequest(tell=True)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert capfd.readouterr().err.startswith("\nCtrl-C: the run finishes this step, saves and ends")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        at_the_end = StopRequest(tell=True)
        at_the_end.all_saved = True
        os.kill(os.getpid(), signal.SIGINT)
        assert "Ctrl-C: all steps are saved; the run finishes what is under way" in capfd.readouterr().err
        silent = StopRequest()
        os.kill(os.getpid(), signal.SIGINT)
        assert silent.requested and capfd.readouterr().err == ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_bad_step_names_ranks_and_samples() -> None:
    told = bad_step(2, (8, 15), [(1, [8, 9]), (3, list(range(20, 32)))])
    assert told.startswith("step 2: the loss was not finite on rank 1 (its samples 8, 9); rank 3 (its samples 20 to 31")
    assert "step 2: the gradient (samples 8 to 15) was not finite" in bad_step(2, (8, 15), [])
    # With samples passed over before, the numbers are still those that data.skip_ranges takes.
    assert "(samples 18 to 25)" in bad_step(2, sample_ids(8, 16, [(0, 10)]), [])
