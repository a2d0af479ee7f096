"""The run folder, what is said into it, and what a run says of itself."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from data.batches import TrainingData
from launch.rewind import go_back
from model.decoder import Decoder
from model.flops import Routed, dense_flops, executed_flops
from settings import user_errors
from tests.trainer.checkpoints.test_resume import fake
from trainer import git_state
from trainer.config import PretrainConfig, load_run
from trainer.distributed import World
from trainer.evaluate import Evaluation
from trainer.heartbeat import read_beats
from trainer.log import open_log
from trainer.monitor.summary import describe_end, describe_start
from trainer.run_folder import RunFolder
from trainer.tally import Tally

Configure = Callable[..., PretrainConfig]
Write = Callable[..., str]


@pytest.fixture
def run(configure: Configure, write_config: Write, tiny: dict[str, Any]) -> RunFolder:
    made = RunFolder(tiny["train"]["run_dir"], 0)
    made.create(configure(), write_config(tiny))
    return made


def test_the_saved_config_is_the_run_and_can_be_started_from(
    run: RunFolder, configure: Configure, write_config: Write, tiny: dict[str, Any]
) -> None:
    assert (run.path / "config.original.yaml").read_text() == Path(write_config(tiny)).read_text()
    assert load_run(run.path / "config.yaml") == configure()
    folders = {p.name for p in run.path.iterdir() if p.is_dir()}
    assert folders == {"checkpoints", "heartbeat", "logs", "tensorboard", "tokenizer"}


def test_a_run_resumed_from_its_own_config_keeps_what_the_user_wrote(
    run: RunFolder, configure: Configure, write_config: Write, tiny: dict[str, Any], tmp_path: Path
) -> None:
    original, saved = run.path / "config.original.yaml", run.path / "checkpoints/step-00000004/config.yaml"
    written = original.read_text()
    saved.parent.mkdir()
    saved.write_bytes((run.path / "config.yaml").read_bytes())
    (tmp_path / "link").symlink_to(run.path)
    for config in (run.path / "config.yaml", original, saved, tmp_path / "link" / "config.yaml"):
        run.create(load_run(config), config)
        assert original.read_text() == written != (run.path / "config.yaml").read_text()
    for config in (tmp_path / "other.yaml", run.path / "mine.yaml"):  # the user's, wherever it lies
        config.write_text(f"# of {config.name}\n{written}")
        run.create(load_run(config), config)
        assert original.read_text() == config.read_text()


def test_a_config_that_the_user_wrote_into_the_run_folder_is_kept(
    configure: Configure, write_config: Write, tiny: dict[str, Any], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "new", 0)
    run.path.mkdir()
    written = f"# why\n{Path(write_config(tiny)).read_text()}"
    (run.path / "config.yaml").write_text(written)
    run.create(configure(), run.path / "config.yaml")
    assert (run.path / "config.original.yaml").read_text() == written
    assert load_run(run.path / "config.yaml") == configure()


def test_a_start_keeps_other_commands_out_before_it_reads_anything(
    run: RunFolder,
    configure: Configure,
    write_config: Write,
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainer.run_folder._LET_GO_S", 0.2)
    with ExitStack() as hold, ExitStack() as other:
        assert run.lock(hold) is None
        assert run.claim(configure(), write_config(tiny), hold) is None  # by the same start
        told = RunFolder(run.path, 0).lock(other)
        assert told is not None and told.startswith(f"another command is writing to {run.path}")
        fake(run.checkpoints, 10)
        with pytest.raises(ValueError, match="another command is writing to"):
            go_back(run.path, 10)
    with ExitStack() as other:
        assert RunFolder(run.path, 0).lock(other) is None
        assert RunFolder(tmp_path / "new", 0).lock(other) is None and not (tmp_path / "new").exists()


def test_which_code_it_was(
    run: RunFolder, configure: Configure, write_config: Write, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, diff in (("abc-dirty", "--- a\n+++ b\n"), ("abc", ""), (None, "")):
        monkeypatch.setattr(git_state, "commit", lambda found=commit: found)
        monkeypatch.setattr(git_state, "diff", lambda found=diff: found)
        run.create(configure(), write_config(tiny))
        found = {path.name: path.read_text() for path in run.path.glob("code.*")}
        assert found == {name: text for name, text in (("code.commit", commit), ("code.diff", diff)) if text}


def test_what_an_earlier_start_with_more_ranks_said_is_gone(
    run: RunFolder, configure: Configure, write_config: Write, tiny: dict[str, Any]
) -> None:
    RunFolder(run.path, 3).heartbeat.write()
    assert [beat.rank for beat in read_beats(run.path / "heartbeat")] == [3]
    run.create(configure(), write_config(tiny))
    assert read_beats(run.path / "heartbeat") == []


def test_a_terminal_that_is_gone_does_not_end_the_run(
    run: RunFolder, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the connection that started the run is lost: the run must go on to its save."""
    logger = open_log(run.log, world.is_main)
    readable, writable = os.pipe()
    os.close(readable)
    with open(writable, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        logger.info("to nobody")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            gone.close()
    assert "to nobody" in run.log.read_text()


@pytest.mark.parametrize(("rank", "shown"), [(0, ["to all", "careful"]), (1, [])])
def test_every_rank_logs_to_its_file_and_only_rank_0_to_the_terminal(
    run: RunFolder, world: World, rank: int, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logger = open_log(RunFolder(run.path, rank).log, rank == 0)
    logger.info("to all")
    logger.warning("careful")
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("a mistake")
    assert capsys.readouterr().out.splitlines() == shown
    text = (run.path / f"logs/rank-{rank}.log").read_text()
    assert "INFO to all" in text and "WARNING careful" in text
    assert "Traceback" in text and "ValueError: a mistake" in text  # kept for whoever looks for a bug


@pytest.mark.parametrize(("error", "printed"), [(OSError(28, "No space left on device"), False), (KeyError("x"), True)])
def test_a_thread_that_a_disk_has_ended_prints_no_traceback(
    run: RunFolder, world: World, error: Exception, printed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of TensorBoard are not ours to catch; any other error is still printed."""
    before = threading.excepthook
    open_log(run.log, world.is_main)
    try:

        def die() -> None:
            raise error

        thread = threading.Thread(target=die)
        thread.start()
        thread.join()
    finally:
        threading.excepthook = before
    assert ("Traceback" in capsys.readouterr().err) == printed
    assert ("No space left on device" in run.log.read_text()) != printed


def _tally(density: list[float], loss: float) -> Tally:
    return Tally(
        100 * loss,
        0.0,
        100,
        0,
        Routed(100, 1, [100 * d for d in density], [1.0] * len(density)),
        0,
        [0.0] * len(density),
    )


def test_the_start_tells_sizes_that_are_true(configure: Configure, world: World) -> None:
    config = configure()
    told = describe_start(config, TrainingData(config.data), world)
    counted = sum(p.numel() for p in Decoder(config.model).parameters())
    assert f"model     {counted:,} parameters" in told
    assert "routing   learned, 3 sites, density 0.5, rounded execution" in told
    assert "training  4 steps of 256 tokens, 1,024 in all" in told
    assert "data      code: " in told and "100% of samples" in told
    assert "machine   1 rank on " in told and "fp32, ZeRO 2, 4 micro-batches of 2 samples" in told
    dense = configure("model.router=null")
    assert "routing   none, every token runs every layer" in describe_start(dense, TrainingData(dense.data), world)


def test_the_end_tells_losses_and_densities(configure: Configure) -> None:
    config = configure()
    before = [Evaluation("code", _tally([0.9, 0.9, 0.9], 6.0), None, None)]
    after = [Evaluation("code", _tally([0.25, 0.375, 0.5], 4.5), None, None)]
    share = executed_flops(config.model, after[0].greedy.routed) / dense_flops(config.model, 100, 1)
    assert 0.5 < share < 1
    last = config.train.steps
    assert describe_end(config, {0: before, last: after}).splitlines() == [
        f"run folder       {config.train.run_dir}",
        "validation loss  code: 6.0000 -> 4.5000 nats per token",
        "density          0.375 in greedy evaluation against a target of 0.500 (sites from 0.250 to 0.500)",
        f"compute          {share:.0%} of the FLOPs of the same tokens without routers, head included",
    ]
    assert "validation loss  code: 4.5000 nats" in describe_end(config, {last: after})  # a resumed run has no start
    assert "density" not in describe_end(configure("model.router=null"), {0: before, last: after})
    assert describe_end(config, {2: after}).splitlines() == [f"run folder       {config.train.run_dir}"]
