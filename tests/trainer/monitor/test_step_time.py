"""What counts as a step's time, and how fast it goes where the first line is far."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from model.budget import Budget
from tests.logged import lines_of
from tests.trainer.monitor.metric_lines import step_result
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.monitor.metrics import Metrics
from trainer.run_folder import RunFolder


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
    made.log_step(1, 8, step_result(), 0.1, Budget(config.model, 32), 0.0)
    made.close()
    assert lines_of(folder.path)[0]["speed/step_s"] == 1.0


def test_saving_and_evaluating_are_not_step_time(
    configure: Callable[..., PretrainConfig], world: World, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, now = configure(), [100.0]
    monkeypatch.setattr("trainer.monitor.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    made = Metrics(config, folder, world, 0, 1e12)
    now[0] += 0.25
    with made.paused():
        now[0] += 60.0
    made.log_step(1, 8, step_result(), 0.1, Budget(config.model, 32), 0.0)
    now[0] += 0.5
    made.log_step(2, 16, step_result(), 0.1, Budget(config.model, 32), 0.0)
    made.close()
    assert [line["speed/step_s"] for line in lines_of(folder.path)] == [0.25, 0.5]


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
            made.log_step(step, 8 * step, step_result(), 0.1, Budget(config.model, 32), 0.0)
        made.close()
        *before, line = lines
        left = "2 h 13 min" if resumed_at == 0 else "66 min"
        foretold = f"step {resumed_at + 2:>6,}  8.0 s a step so far, {left} left; a line every 10 steps"
        assert before == [foretold] * told
        assert line.endswith(" left") and f"step {resumed_at + 10:>6,}  loss " in line
