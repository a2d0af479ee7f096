"""What breaks inside a rank, each a function that is called in every rank before it starts; ``ranks.py`` takes one.

deepspeed --num_gpus 2 --module tests.faults.breakage bad_loss_on_rank_1 CONFIG      # the same under a launcher
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pty
import signal
import sys
import time
from pathlib import Path
from typing import Any

import trainer.step
from model.decoder import DecoderOutput
from pretrain.train import main
from trainer import trainer as trainers
from trainer.checkpoints import save as saving
from trainer.checkpoints import timer
from trainer.tasks import live


def bad_loss_on_rank_1() -> None:
    """From the fourth step on, whatever rank 1 computes in training is not a number."""
    if os.environ["RANK"] != "1":
        return
    forward, calls = trainer.step.forward_at, [0]

    def spoiled(*arguments: Any) -> DecoderOutput:
        output = forward(*arguments)
        calls[0] += 1
        if calls[0] <= 3 * 2 or output.loss is None:  # two micro-batches a step and rank
            return output
        return dataclasses.replace(output, loss=output.loss._replace(loss=output.loss.loss * float("nan")))

    trainer.step.forward_at = spoiled


def signal_in_evaluation() -> None:
    """SIGTERM to rank 1 in the middle of the evaluation after step 4."""
    evaluate = trainers.evaluate

    def interrupted(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1" and arguments[-1] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    trainers.evaluate = interrupted


def signal_in_tasks() -> None:
    """SIGTERM to rank 1 while it runs the first batch of the tasks after step 3."""
    run = live.LiveTasks.run

    def interrupted(self: live.LiveTasks, engine: Any, progress: Any) -> Any:
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == 2:  # the first was at step 0
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, engine, progress)

    calls = [0]
    live.LiveTasks.run = interrupted  # type: ignore[method-assign]


def signal_in_save() -> None:
    """SIGTERM to rank 0 while a thread writes the checkpoint of step 8, which takes half a second more."""
    write = saving._write

    def interrupted(path: Path, content: Any) -> None:
        write(path, content)
        if path.name == "trainer.pt" and path.parent.name.startswith("step-00000008"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    saving._write = interrupted


def hold_in_save() -> None:
    """The checkpoint of step 4 is begun and never finished."""
    write = saving._write

    def held(path: Path, content: Any) -> None:
        write(path, content)
        if path.parent.name.startswith("step-00000004"):
            time.sleep(3600)

    saving._write = held


def let_a_minute_pass_a_step() -> None:
    """The save timer's clock goes on by a minute with every look at it; rank 1's by a day."""
    seconds = itertools.count(0, 60 if os.environ["RANK"] == "0" else 86_400)
    timer.SaveTimer.__init__.__defaults__ = (lambda: next(seconds),)


def lose_the_terminal() -> None:
    """What is printed goes to a terminal, which is closed after the third step, as by a connection that is lost."""
    mine, theirs = pty.openpty()
    for descriptor in (1, 2):
        os.dup2(theirs, descriptor)
    os.close(theirs)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, and inherited so, where the tests were started by nohup
    end_step = trainers.Trainer.end_step

    def and_closed(self: trainers.Trainer, *arguments: Any) -> None:
        end_step(self, *arguments)
        if self.step == 3:
            os.close(mine)
            os.kill(os.getpid(), signal.SIGHUP)

    trainers.Trainer.end_step = and_closed  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv.pop(next(n for n, word in enumerate(sys.argv) if word in globals()))]()
    raise SystemExit(main())
