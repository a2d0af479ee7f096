"""What a run writes down: names as documented, and figures that fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.budget import Budget
from model.flops import Routed, training_flops
from tests.launching import ROOT
from tests.logged import lines_of, steps_of
from tests.trainer.monitor.metric_lines import Train, evaluation_of, in_stages, step_result
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.monitor.metrics import Metrics
from trainer.run_folder import RunFolder
from trainer.tally import BusiestRank


def _documented() -> set[str]:
    text = (ROOT / "docs" / "training.md").read_text()
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    (table,) = [part for part in section if part.startswith("Metrics\n")]
    names = [name for row in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names)) > 20
    return set(names)


def _written(run_dir: str | Path) -> set[str]:
    """Names in a run's metrics, with sites, sources and validation sets as the documentation writes them."""
    names = {name for line in lines_of(run_dir) for name in line}
    sites = {re.sub(r"(layer|attention|ffn)-\d\d$", "SITE", name) for name in names}
    sources = {re.sub(r"^train/(loss|share)/(code|few)$", r"train/\1/SOURCE", name) for name in sites}
    tasks = {re.sub(r"^tasks/\w+/\w+$", "tasks/TASK/METRIC", name) for name in sources}
    return {re.sub(r"^validation/code/", "validation/NAME/", name) for name in tasks}


def test_names_are_those_of_the_documentation(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train, tmp_path: Path
) -> None:
    tiny["model"]["router"]["granularity"] = "module"
    (tmp_path / "own.jsonl").write_text('{"context": "import", "continuation": "os"}\n')
    tiny["train"]["evaluation"]["tasks"] = [str(tmp_path / "own.jsonl")]
    tiny["data"] = in_stages(mixed)
    assert train_here(tiny, "train.steps=2") == 0
    assert _written(tiny["train"]["run_dir"]) == _documented()


def test_a_dense_run_writes_nothing_about_routing(tiny: dict[str, Any], train_here: Train) -> None:
    del tiny["model"]["router"]
    assert train_here(tiny, "train.steps=2") == 0
    left_out = {n for n in _documented() if re.search("SITE|SOURCE|stage|budget|density|noise|noisy|^tasks/", n)}
    assert _written(tiny["train"]["run_dir"]) == _documented() - left_out
    line = steps_of(tiny["train"]["run_dir"])[2]
    assert line["speed/mfu_executed"] == line["speed/mfu_dense_equivalent"]
    assert not (Path(tiny["train"]["run_dir"]) / "routing.png").exists()


def test_the_imbalance_of_ranks_is_that_of_the_last_step_of_a_line(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    """Two ranks, which executed 15 and 5 tokens at every site of this step."""
    config = configure("train.log.every_steps=2")
    together = Routed(20, 110, [20.0] * 3, [40.0] * 3)
    most = Routed(10, 55, [15.0, 15.0, 20.0], [30.0, 30.0, 40.0])
    flops = training_flops(config.model, Routed(10, 55, [15.0] * 3, [30.0] * 3))
    step = replace(step_result(), tally=replace(step_result().tally, routed=together), largest=BusiestRank(flops, most))
    made = Metrics(config, folder, replace(world, size=2), 0, 1e12)
    made.log_step(1, 8, step_result(), 0.1, Budget(config.model, 32), 0.0)
    made.log_step(2, 16, step, 0.1, Budget(config.model, 32), 0.0)
    made.close()
    (line,) = lines_of(folder.path)
    mean = training_flops(config.model, together) / 2
    assert line["speed/imbalance"] == flops / mean > 1.1
    assert line["speed/imbalance_every_layer"] == training_flops(config.model, most) / mean > line["speed/imbalance"]
    assert [line[f"speed/imbalance/layer-{layer:02d}"] for layer in range(3)] == [1.5, 1.5, 2.0]


@pytest.mark.quick
def test_figures_fit_together(tiny: dict[str, Any], train_here: Train) -> None:
    """Peak is 1 TFLOP/s in the tiny run."""
    assert train_here(tiny) == 0
    steps = steps_of(tiny["train"]["run_dir"])
    assert sorted(steps) == [1, 2, 3, 4]
    for step, line in steps.items():
        assert line["train/tokens"] == step * 8 * 32
        assert line["speed/tokens_per_s"] == pytest.approx(8 * 32 / line["speed/step_s"])
        executed, dense = line["flops/executed_per_token"], line["flops/dense_per_token"]
        assert line["speed/mfu_executed"] == pytest.approx(executed * line["speed/tokens_per_s"] / 1e12)
        assert line["speed/mfu_dense_equivalent"] == pytest.approx(dense * line["speed/tokens_per_s"] / 1e12)
        assert 0 < line["speed/mfu_executed"] < line["speed/mfu_dense_equivalent"]
        densities = [line[f"density/layer-{layer:02d}"] for layer in range(3)]
        assert 0 < line["density/mean"] == pytest.approx(sum(densities) / 3) and line["density/mean"] < 1
        half_cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / 3)) / 2  # to a tenth at the last step
        assert line["optimizer/lr"] == pytest.approx(0.003 * half_cosine)
        assert line["budget/target"] == 0.5
        alone = {name: value for name, value in line.items() if name.startswith("speed/imbalance")}
        assert len(alone) == 5 and set(alone.values()) == {1.0}
        assert 0 <= line["speed/data_wait_share"] < 1 and line["memory/peak_bytes"] > 10_000_000
    evaluation = lines_of(tiny["train"]["run_dir"])[-1]
    greedy, noisy = (evaluation[f"validation/code/{name}"] for name in ("loss", "loss_with_noise"))
    assert evaluation["validation/code/loss_greedy_minus_noisy"] == pytest.approx(greedy - noisy, abs=1e-12)


def test_a_line_is_the_mean_over_its_steps(tiny: dict[str, Any], train_here: Train, tmp_path: Path) -> None:
    assert train_here(tiny) == 0
    one = steps_of(tiny["train"]["run_dir"])
    assert train_here(tiny, "train.log.every_steps=3", f"train.run_dir={tmp_path / 'three'}") == 0
    three = steps_of(tmp_path / "three")
    assert sorted(three) == [3, 4]  # and always the last
    for name in ("train/loss", "train/z", "optimizer/grad_norm", "density/mean", "budget/penalty"):
        assert three[3][name] == pytest.approx(sum(one[s][name] for s in (1, 2, 3)) / 3, rel=1e-6), name
        assert three[4][name] == pytest.approx(one[4][name], rel=1e-6)
    assert three[3]["train/tokens"] == one[3]["train/tokens"]


def test_tensorboard_holds_the_same_figures(tiny: dict[str, Any], train_here: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny["train"]["log"]["images"] = True
    assert train_here(tiny, "train.steps=2") == 0
    events = EventAccumulator(str(Path(tiny["train"]["run_dir"]) / "tensorboard")).Reload()
    names = {name for line in lines_of(tiny["train"]["run_dir"]) for name in line} - {"step"}
    assert set(events.Tags()["scalars"]) == names and events.Tags()["images"] == ["routing"]
    loss = {e.step: e.value for e in events.Scalars("train/loss")}
    assert loss == {s: pytest.approx(line["train/loss"]) for s, line in steps_of(tiny["train"]["run_dir"]).items()}


def test_what_is_not_a_number_is_null(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    """Python would write NaN and Infinity, which no other JSON reader takes."""
    made = Metrics(configure(), folder, world, 0, 1e12)
    made.log_scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": 3})
    made.close()
    text = folder.metrics.read_text()
    assert text == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.5, "e": 3}\n'


def test_only_rank_0_writes(configure: Callable[..., PretrainConfig], folder: RunFolder, world: World) -> None:
    before = folder.metrics.read_bytes()
    made = Metrics(configure(), folder, World(1, 2, 1, 2, world.device), 3, 1e12)
    made.log_evaluation(4, [evaluation_of([0.7, 0.6, 0.5])])
    made.close()
    assert folder.metrics.read_bytes() == before and not list(folder.tensorboard.iterdir())


def test_the_target_in_a_line_is_that_of_its_step(tiny: dict[str, Any], train_here: Train) -> None:
    """Step n of a line is number n - 1, counted from 0."""
    tiny["model"]["router"]["budget"] = {"dense_until": 0.25, "reach_by": 0.75}
    assert train_here(tiny) == 0
    targets = [line["budget/target"] for line in steps_of(tiny["train"]["run_dir"]).values()]
    assert targets == pytest.approx([1.0, 1.0, 0.75, 0.5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mfu_is_a_share_of_the_measured_peak(
    precision: str, tiny: dict[str, Any], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["train"] |= {"precision": precision, "log": {"every_steps": 1, "images": False}}
    assert train_here(tiny) == 0
    assert all(0 < line["speed/mfu_executed"] < 1 for line in steps_of(tiny["train"]["run_dir"]).values())
    assert "that MFU is measured against" not in capsys.readouterr().out


def test_a_peak_below_what_steps_reach_is_raised_and_told_once(
    tiny: dict[str, Any], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["train"]["log"] |= {"peak_tflops": 1e-9}
    assert train_here(tiny) == 0
    shares = [line["speed/mfu_executed"] for line in steps_of(tiny["train"]["run_dir"]).values()]
    assert shares[0] == pytest.approx(1) and all(0 < share < 1 + 1e-12 for share in shares)  # divided and multiplied
    told = [
        line for line in capsys.readouterr().out.splitlines() if "peak of 1e-09 that MFU is measured against" in line
    ]
    assert len(told) == 1 and "set train.log.peak_tflops to the device's peak" in told[0]
