"""Checkpoints are written while training goes on, one at a time, and a write that fails is not lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from data.files import only_writer
from tests.trainer.one_rank import engine_for, save_now, take_steps
from trainer import run_folder
from trainer import trainer as trainers
from trainer.checkpoints import manifest, receipts, resume
from trainer.checkpoints import save as saving
from trainer.checkpoints.save import Saver, _on_host
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.exit_status import EXIT_MISTAKE
from trainer.tally import StepResult
from trainer.trainer import Trainer

Configure = Callable[..., PretrainConfig]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are written only once this is set."""
    event, write = threading.Event(), saving._write

    def wait(path: Path, content: Any) -> None:
        assert event.wait(60.0)
        write(path, content)

    monkeypatch.setattr(saving, "_write", wait)
    return event


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_is_written_is_the_moment_of_the_save(
    configure: Configure, world: World, tmp_path: Path, hold: threading.Event, stage: int
) -> None:
    """Training has gone on for two steps before the first byte is on the disk."""
    config, said = configure(f"deepspeed.zero_stage={stage}", "train.precision=bf16"), list[str]()
    folder = tmp_path / "checkpoints"
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        saver = Saver(folder, "f", config, world, said.append)
        final = saver.save(engine, 1, {"step": 1})
        straight = [r.tally.loss for r in take_steps(engine, config, world, 2, first=1)]
        assert manifest.newest_whole(folder, world) == (None, ["step-00000001.partial was never finished"]) and not said
        hold.set()
        saver.wait()
    assert manifest.newest_whole(folder, world) == (final, [])
    assert len(said) == 1 and said[0].startswith(f"saved {final} in ")
    with engine_for(config, world) as engine:
        resume.load(engine, final, "f", config, world)
        assert [r.tally.loss for r in take_steps(engine, config, world, 2, first=1)] == straight


def test_the_next_save_waits_for_the_one_before(
    configure: Configure, world: World, tmp_path: Path, hold: threading.Event
) -> None:
    """So that at most one copy of the state is held; the first is whole when the second begins."""
    config = configure()
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        saver = Saver(tmp_path, "f", config, world)
        first = saver.save(engine, 1, {"step": 1})
        threading.Timer(0.3, hold.set).start()
        saver.save(engine, 2, {"step": 2})
        assert manifest.newest_whole(tmp_path, world)[0] == first
        saver.wait()
    assert manifest.newest_whole(tmp_path, world)[0] == tmp_path / "step-00000002"


@pytest.mark.parametrize("lasting", [True, False])
def test_a_write_that_fails_is_tried_once_more_at_the_next_step_and_then_ends_the_run(
    tiny: dict[str, Any],
    train_here: Callable[..., int],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lasting: bool,
) -> None:
    write, failed = saving._write, set[str]()

    def fail(path: Path, content: Any) -> None:
        number = path.relative_to(Path(tiny["train"]["run_dir"]) / "checkpoints").parts[0]
        if number != "step-00000002.partial" and (lasting or failed <= {number}):
            failed.add(number)
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(saving, "_write", fail)
    tiny["train"] |= {"steps": 12, "checkpoint": {"every_steps": 2}}
    status, told = train_here(tiny), capsys.readouterr()
    checkpoints = Path(tiny["train"]["run_dir"]) / "checkpoints"
    newest = manifest.newest_whole(checkpoints, world)[0]
    first = f"checkpoint step-00000004 could not be written to {checkpoints} ([Errno 28] No space left on device)"
    assert f"{first}; make room there and resume: the newest checkpoint is step-00000002; trying once more" in told.out
    if lasting:
        assert status == EXIT_MISTAKE and newest == checkpoints / "step-00000002"
        assert "error: checkpoint step-0000000" in told.err
        assert "make room there and resume: the newest checkpoint is step-00000002" in told.err
    else:
        assert status == 0 and newest == checkpoints / "step-00000012" and "asked to stop" not in told.out


def test_an_error_of_the_run_itself_waits_for_the_checkpoint_that_is_being_written(
    tiny: dict[str, Any],
    train_here: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it names as the newest checkpoint is that one, and it is whole when the run has ended."""
    write = saving._write

    def slowly(path: Path, content: Any) -> None:
        time.sleep(0.3)
        write(path, content)

    def three_are_good(self: Any, result: StepResult, *rest: Any) -> None:
        end_step(self, replace(result, applied=self.step < 3), *rest)

    end_step = Trainer.end_step
    monkeypatch.setattr(saving, "_write", slowly)
    monkeypatch.setattr(Trainer, "end_step", three_are_good)
    tiny["train"] |= {"steps": 9, "max_bad_steps": 1, "checkpoint": {"every_steps": 3}}
    assert train_here(tiny) == EXIT_MISTAKE
    assert "the newest checkpoint is step-00000003" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_folder(
    tiny: dict[str, Any],
    train_here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one is refused before it builds an engine, for which the first may have left no memory."""
    folder = Path(tiny["train"]["run_dir"])
    folder.mkdir()
    monkeypatch.setattr(run_folder, "_LET_GO_S", 0.2)
    with only_writer(folder), monkeypatch.context() as busy:
        busy.setattr(trainers, "build_engine", lambda *_: pytest.fail("an engine was built"))
        assert train_here(tiny) == EXIT_MISTAKE
    assert f"error: another command is writing to {folder}; wait until it ends" in capsys.readouterr().err
    assert list(folder.iterdir()) == []

    monkeypatch.setattr(run_folder, "_LET_GO_S", 20.0)
    with ExitStack() as killed:
        killed.enter_context(only_writer(folder))
        threading.Timer(2.0, killed.close).start()
        assert train_here(tiny) == 0


@pytest.mark.parametrize(("quiet_s", "expected"), [(0.2, 1), (60.0, 2)])
def test_one_who_waits_says_that_all_is_well_as_long_as_the_checkpoint_grows(
    configure: Configure, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_s: float, expected: int
) -> None:
    """Rank 0 has written its part; rank 1's file grows, then come the receipt and the end."""
    ticks, two = list[float](), TwoRanks(0, 2, 0, 1, torch.device("cpu"))
    monkeypatch.setattr(saving, "_QUIET_S", quiet_s)
    saver = Saver(tmp_path, "f", configure(), two, tick=lambda: ticks.append(0.0))
    partial, final = tmp_path / "step-00000001.partial", tmp_path / "step-00000001"
    saver._partial, saver._final = partial, final
    receipts.begin(partial)
    saver._thread = threading.Thread(target=saver._run, args=({}, partial, {}, 0.0))

    def other_rank() -> None:
        for size in range(1, 4):
            time.sleep(0.5)
            (partial / "part").write_text("x" * size)
        receipts.leave(partial, 1, {"part": {}})

    other = threading.Thread(target=other_rank)
    saver._thread.start()
    other.start()
    saver._written.wait()
    saver._watch(saving._QUIET_S)
    assert len(ticks) >= expected and (receipts.last_growth(partial) is None) == (quiet_s > 1)
    other.join()
    saver._thread.join()
    assert final.is_dir() and {path.name for path in final.iterdir()} == {"part", "manifest.json"}


def test_an_error_of_ours_is_told_apart_from_one_of_the_disk(
    configure: Configure, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: Any) -> None:
        raise KeyError("exp_avg")

    monkeypatch.setattr(saving, "_write", fail)
    config = configure()
    with engine_for(config, world) as engine:
        saver = Saver(tmp_path, "f", config, world)
        saver.save(engine, 1, {"step": 1})
        with pytest.raises(ValueError, match=r"\(KeyError: 'exp_avg'\), a bug in Hopscotch; report it with"):
            saver.wait()
        assert not saver.failed  # reported once
        saver.wait()


def test_a_folder_that_cannot_be_made(configure: Configure, world: World, tmp_path: Path) -> None:
    """The run folder was replaced by a file while training; a vanished one is made again."""
    config = configure()
    with engine_for(config, world) as engine:
        (tmp_path / "file").write_text("")
        saver = Saver(tmp_path / "file" / "checkpoints", "f", config, world)
        with pytest.raises(ValueError, match=r"step-00000001.partial cannot be made \(Not a directory\); make .* writ"):
            saver.save(engine, 1, {"step": 1})
        again = Saver(tmp_path / "vanished" / "checkpoints", "f", config, world)
        saved = again.save(engine, 1, {"step": 1})
        again.wait()
        assert manifest.newest_whole(saved.parent, world) == (saved, [])


class TwoRanks(World):
    """Rank 0 of two, of which the other one says what it is told to."""

    said: Any = None

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value, self.said]

    def broadcast_object(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


def test_a_disk_that_is_not_shared_is_told_before_anything_is_written(
    configure: Configure, world: World, tmp_path: Path
) -> None:
    config, two = configure(), TwoRanks(0, 2, 0, 1, torch.device("cpu"))
    TwoRanks.said = False
    with (
        engine_for(config, world) as engine,
        pytest.raises(ValueError, match=r"rank 1 does not see .*partial, which rank 0 has created; put train.run_dir"),
    ):
        Saver(tmp_path, "f", config, two).save(engine, 1, {"step": 1})


def test_a_rank_that_could_not_write_ends_the_others_with_its_reason(
    configure: Configure, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 does not wait for a receipt that will never come."""
    monkeypatch.setattr(saving, "_QUIET_S", 1.0)
    config, two = configure(), TwoRanks(0, 2, 0, 1, torch.device("cpu"))
    with engine_for(config, world) as engine:
        saver = Saver(tmp_path, "f", config, two)
        TwoRanks.said = True  # the other one sees the folder
        saver.save(engine, 1, {"step": 1})
        TwoRanks.said = "(disk of rank 1 is gone); make room there and resume"
        with pytest.raises(ValueError, match=r"could not be written .* \(disk of rank 1 is gone\)"):
            saver.wait()
    assert manifest.newest_whole(tmp_path, world) == (None, ["step-00000001.partial was never finished"])


def test_a_copy_shares_nothing_and_keeps_what_was_one_tensor_one() -> None:
    base = torch.arange(6.0)
    original = {"a": base, "same": base, "part": base[2:], "list": [base[:2], (1, "x")], "size": torch.Size([2])}
    copied = _on_host(original, {})
    base.zero_()
    assert copied["a"].tolist() == [0, 1, 2, 3, 4, 5] and copied["a"] is copied["same"]
    assert copied["part"].tolist() == [2, 3, 4, 5] and copied["part"].untyped_storage().nbytes() == 16
    assert copied["list"][1] == (1, "x") and isinstance(copied["size"], torch.Size)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_files_hold_no_enum(configure: Configure, world: World, tmp_path: Path, stage: int) -> None:
    """Debian 12's Python 3.11.2 pickles one of DeepSpeed's by a call to getattr, and then refuses to load it."""

    class Stage(IntEnum):
        TWO = 2

    assert type(_on_host({"a": [Stage.TWO]}, {})["a"][0]) is int
    config = configure(f"deepspeed.zero_stage={stage}", "train.precision=bf16")
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        saved = save_now(engine, tmp_path, 1, {"step": 1}, "f", config, world)
    files = sorted((saved / "deepspeed").iterdir())
    needed = {name.rpartition(".")[2] for file in files for name in get_unsafe_globals_in_checkpoint(file)}
    assert files and needed <= {"LossScaler", "DynamicLossScaler", "fragment_address"}
