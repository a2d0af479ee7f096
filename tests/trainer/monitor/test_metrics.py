"""What a run writes down: names as documented, figures that fit together, one line a step after any kill."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.batches import TrainingData
from data.config import DataConfig
from model.budget import Budget
from model.flops import Routed, training_flops
from tests.launching import ROOT
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.evaluate import Evaluation
from trainer.exit_status import EXIT_PREEMPTED
from trainer.monitor import routing_figure as heatmap
from trainer.monitor.metrics import Metrics
from trainer.monitor.stop import StopRequest
from trainer.run_folder import RunFolder
from trainer.tally import BusiestRank, StepResult, Tally

Train = Callable[..., int]

_OF_TIME = ("speed/", "memory/")


def _lines(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def _steps(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """Training lines by step."""
    return {line["step"]: line for line in _lines(run_dir) if "train/loss" in line}


def _documented() -> set[str]:
    text = (ROOT / "docs" / "training.md").read_text()
    section = re.split(r"^## ", text, flags=re.MULTILINE)
    (table,) = [part for part in section if part.startswith("Metrics\n")]
    names = [name for row in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names)) > 20
    return set(names)


def _written(run_dir: str | Path) -> set[str]:
    """Names in a run's metrics, with sites, sources and validation sets as the documentation writes them."""
    names = {name for line in _lines(run_dir) for name in line}
    sites = {re.sub(r"(layer|attention|ffn)-\d\d$", "SITE", name) for name in names}
    sources = {re.sub(r"^train/(loss|share)/(code|few)$", r"train/\1/SOURCE", name) for name in sites}
    tasks = {re.sub(r"^tasks/\w+/\w+$", "tasks/TASK/METRIC", name) for name in sources}
    return {re.sub(r"^validation/code/", "validation/NAME/", name) for name in tasks}


def in_stages(data: dict[str, Any]) -> dict[str, Any]:
    """With a second stage, without ``code``, from within the third step of the tiny run on."""
    stages = [
        {"name": "main", "from_tokens": 0, "weights": {"code": 3, "few": 1}},
        {"name": "end", "from_share": 20 / 32, "weights": {"few": 1}},
    ]
    return data | {"stages": stages}


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
    line = _steps(tiny["train"]["run_dir"])[2]
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
    step = replace(_step(), tally=replace(_step().tally, routed=together), largest=BusiestRank(flops, most))
    made = Metrics(config, folder, replace(world, size=2), 0, 1e12)
    made.log_step(1, 8, _step(), 0.1, Budget(config.model, 32), 0.0)
    made.log_step(2, 16, step, 0.1, Budget(config.model, 32), 0.0)
    made.close()
    (line,) = _lines(folder.path)
    mean = training_flops(config.model, together) / 2
    assert line["speed/imbalance"] == flops / mean > 1.1
    assert line["speed/imbalance_every_layer"] == training_flops(config.model, most) / mean > line["speed/imbalance"]
    assert [line[f"speed/imbalance/layer-{layer:02d}"] for layer in range(3)] == [1.5, 1.5, 2.0]


@pytest.mark.quick
def test_figures_fit_together(tiny: dict[str, Any], train_here: Train) -> None:
    """Peak is 1 TFLOP/s in the tiny run."""
    assert train_here(tiny) == 0
    steps = _steps(tiny["train"]["run_dir"])
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
    evaluation = _lines(tiny["train"]["run_dir"])[-1]
    greedy, noisy = (evaluation[f"validation/code/{name}"] for name in ("loss", "loss_with_noise"))
    assert evaluation["validation/code/loss_greedy_minus_noisy"] == pytest.approx(greedy - noisy, abs=1e-12)


def test_losses_of_the_sources_add_up_to_the_loss(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train
) -> None:
    """Exactly: the same sums in fp64, in another order. Shares are those of the samples drawn, in the log's steps."""
    tiny["data"], tiny["train"]["log"]["every_steps"] = mixed, 2
    assert train_here(tiny) == 0
    sources = TrainingData(DataConfig.model_validate(mixed)).batch(range(32)).sources
    assert sources is not None
    samples = sources.numpy()
    for step, line in _steps(tiny["train"]["run_dir"]).items():
        shares = {name: line[f"train/share/{name}"] for name in ("code", "few")}
        few = (samples[8 * step - 16 : 8 * step] == 1).mean()
        assert 0 < few < 0.5 and shares == {"code": 1 - few, "few": few}
        losses = {name: line[f"train/loss/{name}"] for name in shares}
        assert abs(losses["code"] - losses["few"]) > 1e-3
        assert sum(shares[n] * losses[n] for n in shares) == pytest.approx(line["train/loss"], rel=1e-14)


def test_a_source_without_samples_in_a_line_has_no_loss(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train
) -> None:
    mixed["sources"][1]["weight"] = 0.004  # of the 8 samples none is its own
    tiny["data"] = mixed
    assert train_here(tiny, "train.steps=1") == 0
    line = _steps(tiny["train"]["run_dir"])[1]
    assert line["train/loss/few"] is None and line["train/share/few"] == 0
    assert line["train/loss/code"] == pytest.approx(line["train/loss"], rel=1e-14)


def test_a_border_is_marked_and_crossed_by_a_resume_bit_by_bit(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 has samples 16 to 23, of which 20 is the first of the second stage; the log says so once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tiny["train"]["run_dir"]
    tiny["data"] = in_stages(mixed)
    told = "step      3  data.stages: end begins with sample 20: few 100%"
    assert train_here(tiny, f"train.run_dir={run_dir}-straight", "train.log.every_steps=2") == 0
    out = capsys.readouterr().out
    assert out.count("data.stages: ") == 1 and told in out
    assert "stage     main from token 0 on: code " in out and "stage     end from token 640 on: few 384 tokens (" in out

    assert train_here(tiny, "train.log.every_steps=2") == 0
    shutil.rmtree(Path(run_dir) / "checkpoints/step-00000004")
    capsys.readouterr()
    assert train_here(tiny, "train.log.every_steps=2", "train.checkpoint.resume=required") == 0
    assert capsys.readouterr().out.count(told) == 1
    one, other = (
        [{k: v for k, v in line.items() if not k.startswith(_OF_TIME)} for line in _lines(folder)]
        for folder in (f"{run_dir}-straight", run_dir)
    )
    assert one == other
    assert {line["step"]: line["data/stage"] for line in one if "data/stage" in line} == {2: 0, 3: 1, 4: 1}
    last = one[-1]
    assert last["train/share/code"] == pytest.approx(1 - last["train/share/few"]) and last["train/share/few"] > 0.75
    events = EventAccumulator(str(Path(run_dir) / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["data/stages/text_summary"]
    assert {event.step for event in events.Tensors("data/stages/text_summary")} == {3}


def test_a_source_that_is_absent_from_a_stage_has_no_loss(
    tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train
) -> None:
    tiny["data"] = in_stages(mixed)
    assert train_here(tiny) == 0
    line = _steps(tiny["train"]["run_dir"])[4]
    assert line["train/loss/code"] is None and line["train/share/code"] == 0
    assert line["train/loss/few"] == pytest.approx(line["train/loss"], rel=1e-14)


def test_a_border_is_no_spike(tiny: dict[str, Any], mixed: dict[str, Any], train_here: Train) -> None:
    """Where a stage begins losses may be others, so what was normal before it is forgotten."""
    tiny["data"] = in_stages(mixed)
    assert train_here(tiny) == 0
    state = torch.load(Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000004/trainer.pt", weights_only=True)
    losses = [line["train/loss"] for line in _steps(tiny["train"]["run_dir"]).values()]
    assert state["spikes"]["losses"] == pytest.approx(losses[2:], rel=1e-12)


def test_a_line_is_the_mean_over_its_steps(tiny: dict[str, Any], train_here: Train, tmp_path: Path) -> None:
    assert train_here(tiny) == 0
    one = _steps(tiny["train"]["run_dir"])
    assert train_here(tiny, "train.log.every_steps=3", f"train.run_dir={tmp_path / 'three'}") == 0
    three = _steps(tmp_path / "three")
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
    names = {name for line in _lines(tiny["train"]["run_dir"]) for name in line} - {"step"}
    assert set(events.Tags()["scalars"]) == names and events.Tags()["images"] == ["routing"]
    loss = {e.step: e.value for e in events.Scalars("train/loss")}
    assert loss == {s: pytest.approx(line["train/loss"]) for s, line in _steps(tiny["train"]["run_dir"]).items()}


@pytest.fixture
def folder(
    tiny: dict[str, Any], configure: Callable[..., PretrainConfig], write_config: Callable[..., str]
) -> RunFolder:
    """The run's folder, with five logged steps, an evaluation at 2 and 4, and a line that a kill cut in half."""
    run = RunFolder(tiny["train"]["run_dir"], 0)
    run.create(configure(), write_config(tiny))
    density = {f"validation/code/density/layer-{layer:02d}": 0.1 * layer for layer in range(3)}
    lines: list[dict[str, Any]] = [{"step": s, "train/loss": 5.0 - s} for s in range(1, 6)]
    lines[1] |= {"validation/code/loss": 4.0, **density}
    lines[3] |= {"validation/code/loss": 3.0, **density}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "train/lo')
    return run


@pytest.mark.parametrize(("resumed_at", "kept"), [(3, [1, 2, 3]), (2, [1, 2]), (0, []), (None, [])])
def test_a_resume_keeps_the_lines_up_to_its_step(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder, resumed_at: int | None, kept: list[int]
) -> None:
    made = Metrics(configure(), folder, world, resumed_at, 1e12)
    assert made.has_evaluation(2) == (2 in kept) and not made.has_evaluation(4) and not made.has_evaluation(3)
    made.log_evaluation(9, [_evaluation([0.5, 0.5, 0.5])])
    made.close()
    assert [line["step"] for line in _lines(folder.path)] == [*kept, 9]


def test_a_refused_start_leaves_the_line_of_its_step(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    """What an evaluation found after the last save is nowhere else."""
    folder.metrics.write_text('{"step": 1}\n{"step": 2, "validation/code/loss": 3.5}\n{"step": 3}\n')
    for _ in range(2):  # the first is refused before it trains
        made = Metrics(configure(), folder, world, 2, 1e12)
        assert [line["step"] for line in _lines(folder.path)] == [1, 2]
    made.log_scalars(2, {"more": 1.0})
    made.log_scalars(3, {"more": 2.0})
    made.close()
    assert _lines(folder.path) == [
        {"step": 1}, {"step": 2, "validation/code/loss": 3.5, "more": 1.0}, {"step": 3, "more": 2.0},
    ]  # fmt: skip


def test_what_comes_before_the_first_step_is_not_its_time(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("trainer.monitor.metrics.time.perf_counter", lambda: now[0])
    config = configure("train.log.every_steps=1")
    made = Metrics(config, folder, world, None, 1e12)
    now[0] = 20.0  # a mirror that does not answer
    made.begin()
    now[0] = 21.0
    made.log_step(1, 8, _step(), 0.1, Budget(config.model, 32), 0.0)
    made.close()
    assert _lines(folder.path)[0]["speed/step_s"] == 1.0


def test_an_evaluation_of_before_the_resume_is_drawn_again(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    draw = heatmap.routing_figure

    def record(*arguments: Any) -> Any:
        seen.append(arguments)
        return draw(*arguments)

    monkeypatch.setattr(heatmap, "routing_figure", record)
    made = Metrics(configure("train.log.images=true"), folder, world, 3, 1e12, "code")
    made.log_evaluation(4, [_evaluation([0.7, 0.6, 0.5])])
    made.close()
    ((sites, steps, densities, executed, target),) = seen
    assert (sites, list(steps), target) == (["layer-00", "layer-01", "layer-02"], [2, 4], 0.5)
    assert [pytest.approx(d) for d in densities] == [[0.0, 0.1, 0.2], [0.7, 0.6, 0.5]]
    assert executed.shape == (3, 8) and (folder.path / "routing.png").stat().st_size > 5000


def _evaluation(density: list[float]) -> Evaluation:
    routed = Routed(10, 55, [10 * d for d in density], [20.0] * len(density))
    return Evaluation(
        "code",
        Tally(20.0, 0.0, 10, 0, routed, 0, [0.0] * len(density)),
        None,
        torch.ones(len(density), 8, dtype=torch.bool),
    )


def test_images_can_be_turned_off(configure: Callable[..., PretrainConfig], world: World, folder: RunFolder) -> None:
    made = Metrics(configure("train.log.images=false"), folder, world, 3, 1e12)
    made.log_evaluation(4, [_evaluation([0.7, 0.6, 0.5])])
    made.close()
    assert not (folder.path / "routing.png").exists()


def _step(stop: int = 0) -> StepResult:
    return StepResult(replace(_evaluation([0.5] * 3).greedy, stop=stop), 0.0, 1.0, True, [])


def test_saving_and_evaluating_are_not_step_time(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = configure(), [100.0]
    monkeypatch.setattr("trainer.monitor.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    made = Metrics(config, folder, world, 0, 1e12)
    now[0] += 0.25
    with made.paused():
        now[0] += 60.0
    made.log_step(1, 8, _step(), 0.1, Budget(config.model, 32), 0.0)
    now[0] += 0.5
    made.log_step(2, 16, _step(), 0.1, Budget(config.model, 32), 0.0)
    made.close()
    assert [line["speed/step_s"] for line in _lines(folder.path)] == [0.25, 0.5]


def test_where_the_first_line_is_far_its_speed_is_said_before(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = configure("train.steps=1000", "train.log.every_steps=10"), [100.0]
    monkeypatch.setattr("trainer.monitor.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    for resumed_at, pace_s, told in ((0, 8.0, True), (0, 7.0, False), (500, 8.0, True)):
        lines: list[str] = []
        made = Metrics(config, folder, world, resumed_at, 1e12)
        monkeypatch.setattr(made, "log", SimpleNamespace(info=lines.append, warning=lines.append))
        for step in range(resumed_at + 1, resumed_at + 11):
            now[0] += pace_s
            made.log_step(step, 8 * step, _step(), 0.1, Budget(config.model, 32), 0.0)
        made.close()
        *before, line = lines
        left = "2 h 13 min" if resumed_at == 0 else "66 min"
        foretold = f"step {resumed_at + 2:>6,}  8.0 s a step so far, {left} left; a line every 10 steps"
        assert before == [foretold] * told
        assert line.endswith(" left") and f"step {resumed_at + 10:>6,}  loss " in line


def test_a_stop_between_two_lines_moves_no_mean(tiny: dict[str, Any], train_here: Train, tmp_path: Path) -> None:
    """Stopped after every step; lines are of three."""
    tiny["train"]["log"]["every_steps"] = 3
    tiny["train"]["checkpoint"] = {"every_steps": 2}
    assert train_here(tiny, f"train.run_dir={tmp_path / 'whole'}") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "__init__", lambda self, **_: setattr(self, "requested", True))
        while train_here(tiny, "train.checkpoint.resume=auto") == EXIT_PREEMPTED:
            pass
    lines, whole = (_lines(folder) for folder in (tiny["train"]["run_dir"], tmp_path / "whole"))
    assert [line["step"] for line in lines] == [line["step"] for line in whole] == [0, 2, 3, 4]
    for own, other in zip(lines, whole, strict=True):
        assert {n: v for n, v in own.items() if not n.startswith(_OF_TIME)} == {
            n: v for n, v in other.items() if not n.startswith(_OF_TIME)
        }
        assert own.keys() == other.keys()


def test_the_line_of_a_killed_evaluation_is_in_the_checkpoint(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    config = configure("train.log.every_steps=2", "train.steps=1000")
    killed = Metrics(config, folder, world, None, 1e12)
    for step in (1, 2):
        killed.log_step(step, 8 * step, _step(), 0.1, Budget(config.model, 32), 0.25 * step)
    state = killed.state_dict()
    assert not folder.metrics.read_text()
    made = Metrics(config, folder, world, 2, 1e12)
    made.load_state_dict(state)
    assert not made.has_evaluation(2)
    made.log_evaluation(2, [_evaluation([0.7, 0.6, 0.5])])
    made.write_line()
    (line,) = _lines(folder.path)
    assert (line["step"], line["train/tokens"]) == (2, 2 * 8 * 32) and line["validation/code/loss"] == 2.0
    again = Metrics(config, folder, world, 2, 1e12)  # killed behind its line: nothing twice
    again.load_state_dict(state)
    assert again.has_evaluation(2)
    again.close()
    assert _lines(folder.path) == [line]


def test_steps_on_other_sources_are_not_taken_over(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder
) -> None:
    """A fork may have more of them, or others, and a line tells their losses apart."""
    config = configure("train.log.every_steps=2")
    parent = Metrics(config, folder, world, None, 1e12)
    parent.log_step(1, 8, _step(), 0.1, Budget(config.model, 32), 0.25)
    state = parent.state_dict()
    made = Metrics(config, folder, world, 1, 1e12)
    made.load_state_dict(state | {"sources": ["another"]})
    made.log_step(2, 16, _step(), 0.1, Budget(config.model, 32), 0.5)
    made.close()
    assert _lines(folder.path)[-1]["step"] == 2 and state["sources"] == ["code"]
    assert len(made._since_log) == 0 and made.state_dict()["since_log"] == []
    again = Metrics(config, folder, world, 1, 1e12)
    again.load_state_dict(state | {"sources": ["another"]})
    assert again.state_dict()["since_log"] == []
    again.load_state_dict(state)
    assert len(again.state_dict()["since_log"]) == 1


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
    made.log_evaluation(4, [_evaluation([0.7, 0.6, 0.5])])
    made.close()
    assert folder.metrics.read_bytes() == before and not list(folder.tensorboard.iterdir())


def test_the_target_in_a_line_is_that_of_its_step(tiny: dict[str, Any], train_here: Train) -> None:
    """Step n of a line is number n - 1, counted from 0."""
    tiny["model"]["router"]["budget"] = {"dense_until": 0.25, "reach_by": 0.75}
    assert train_here(tiny) == 0
    targets = [line["budget/target"] for line in _steps(tiny["train"]["run_dir"]).values()]
    assert targets == pytest.approx([1.0, 1.0, 0.75, 0.5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mfu_is_a_share_of_the_measured_peak(
    precision: str, tiny: dict[str, Any], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["train"] |= {"precision": precision, "log": {"every_steps": 1, "images": False}}
    assert train_here(tiny) == 0
    assert all(0 < line["speed/mfu_executed"] < 1 for line in _steps(tiny["train"]["run_dir"]).values())
    assert "the peak that MFU is measured against" not in capsys.readouterr().out


def test_a_peak_below_what_steps_reach_is_raised_and_told_once(
    tiny: dict[str, Any], train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny["train"]["log"] |= {"peak_tflops": 1e-9}
    assert train_here(tiny) == 0
    shares = [line["speed/mfu_executed"] for line in _steps(tiny["train"]["run_dir"]).values()]
    assert shares[0] == pytest.approx(1) and all(0 < share < 1 + 1e-12 for share in shares)  # divided and multiplied
    told = [
        line for line in capsys.readouterr().out.splitlines() if "MFU is measured against was 1e-09 TFLOP/s" in line
    ]
    assert len(told) == 1 and "set train.log.peak_tflops to what the device can do" in told[0]
