"""The benchmark of whole loops: the peer reads what ours reads, and both learn the same before anything is timed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bench.loader import write_shards
from bench.loop import __main__ as loop
from bench.loop.contestants import WindowFile, write_windows
from data.batches import TrainingData
from tests.bench.toy import MODEL, refused, rows_of

TOY = [
    *MODEL,
    "--vocab=300",
    "--device=cpu",
    "--repeats=1",
    "--tokens=32",
    "--samples=4",
    "--micro-samples=1",
    "--steps=4",
]


def options(*arguments: str) -> argparse.Namespace:
    return loop.parse([*TOY, *arguments])


@pytest.mark.slow
def test_both_loops_learn_the_same_and_rows_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real ranks, two micro-batches a step; the command itself compares loss and gradient norm after two updates."""
    rows = rows_of(loop.main, [*TOY, "--explore", "0.1", "--disk", str(tmp_path)], tmp_path / "loop.json", "step_s")
    assert list(rows) == ["dense", "hf_trainer", "routed_0.5_explore_0.1"]
    assert {row["tokens"] for row in rows.values()} == {4 * 32}
    routed = rows["routed_0.5_explore_0.1"]
    assert 0.2 < routed["density"] < 0.8 and rows["hf_trainer"]["density"] == 1.0
    assert None not in routed.values()
    assert rows["dense"]["flop_bound_ratio"] == rows["hf_trainer"]["flop_bound_ratio"] == 1.0
    out = capsys.readouterr().out
    assert "without saving" in out and "mean loss of the first 2 steps" in out
    assert [path.name for path in tmp_path.iterdir()] == ["loop.json"]  # data, runs and checkpoints are gone


def test_contestants_get_the_gpus_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    given, data = options("--ranks=2"), write_shards(tmp_path, vocab=300, tokens=5_000, sequence_tokens=32)
    config = loop.configs(given, data)["dense"]
    assert "--num_gpus" in loop.command(tmp_path, "dense", config, 1, given)
    given.device = "cuda"
    assert "localhost:2,3" in loop.command(tmp_path, "dense", config, 1, given)


def test_the_peer_reads_the_windows_of_the_run(tmp_path: Path) -> None:
    config = write_shards(tmp_path, vocab=70_000, tokens=5_000, sequence_tokens=32)
    data = TrainingData(config)
    write_windows(data, 7, tmp_path / "windows.bin")
    windows, batch = WindowFile(tmp_path / "windows.bin", 70_000, 32), data.batch(range(7))
    assert len(windows) == 7
    for number in range(7):
        item = windows[number]
        assert torch.equal(item["input_ids"], batch.tokens[number])
        assert torch.equal(item["shift_labels"], batch.targets[number])


def test_other_losses_or_gradients_are_not_timed() -> None:
    same = {"loss": 5.0, "grad_norm": 1.0}
    loop.compare(same, {"loss": 5.00001, "grad_norm": 1.0}, torch.float32)
    for other in ({"loss": 5.01}, {"grad_norm": 1.1}):
        with pytest.raises(AssertionError):
            loop.compare(same, {**same, **other}, torch.float32)


def test_contestants_differ_in_the_router_alone(tmp_path: Path) -> None:
    data = write_shards(tmp_path, vocab=300, tokens=5_000, sequence_tokens=32)
    found = loop.configs(options("--explore", "0", "0.1"), data)
    assert list(found) == ["dense", "hf_trainer", "routed_0.5", "routed_0.5_explore_0.1"]
    assert found["dense"] == found["hf_trainer"] and found["dense"].accumulation(2) == 2
    plain, exploring = found["routed_0.5"].model.router, found["routed_0.5_explore_0.1"].model.router
    assert plain is not None and exploring is not None
    assert (plain.explore, exploring.explore) == (0.0, 0.1)
    assert exploring.budget.controller == "adaptive"
    assert found["routed_0.5"].model.model_copy(update={"router": None}) == found["dense"].model
    assert len({config.train.model_dump_json() for config in found.values()}) == 1


def seen(step_s: float, checkpoint_s: float = 0.0, density: float = 1.0) -> loop.Rounds:
    """Two turns of four steps; the checkpoint falls on the second."""
    steps_s = [step_s, step_s + checkpoint_s, step_s, step_s]
    told: dict[str, Any] = {"density": density, "executed_flops": 4e6 * density, "dense_flops": 4e6}
    rounds = loop.Rounds(9.0, {"loss": 5.0, "grad_norm": 1.0})
    for _ in range(2):
        loop.take(rounds, sum(steps_s), [{**told, "steps_s": steps_s, "peak_bytes": size} for size in (7, 8)], 4)
    return rounds


def test_tokens_a_second_have_the_checkpoint_in_them_and_the_limits_get_them() -> None:
    found = {"dense": seen(1.0), "hf_trainer": seen(1.1, 0.4), "routed_0.5": seen(0.6, density=0.5)}
    result = loop.result(found, options(), peak=1e9)
    assert result.measured == {"loop/dense": pytest.approx(1.2), "loop/routed_0.5": pytest.approx(2.0)}
    peer = result.rows[1]
    assert peer.seconds == pytest.approx(1.2) and peer.peak_memory_bytes == 8
    assert result.rows[2].flop_bound_ratio == 0.5
    line = next(line for line in result.findings if "hf_trainer  " in line)
    assert "without saving 1.000; a checkpoint and the logs 0.40 s, start-up 9.0 s" in line
    dense = next(line for line in result.findings if line.startswith("  dense"))
    assert " 128    1.200" in dense and "without saving 1.100" in dense  # 4 x 32 tokens in a second


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--samples", "3"], "--samples (3) must be divisible by --micro-samples x --ranks (1 x 2 = 2)"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--explore", "1.5"], "--explore must lie between 0 and 1, got 1.5"),
        (["--explore", "0.1", "0.1"], "--explore must differ"),
        (["--vocab", "3"], "--vocab must be at least 300, got 3"),
        (["--heads", "3"], "must be divisible by"),
        (["--disk", "no/such/folder"], "--disk no/such/folder is not a folder"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(loop.main, [*TOY, *arguments], capsys)
