"""The routing picture: what is where, sizes that leave little to draw, and when a run draws it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.monitor.metric_lines import evaluation_of
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.monitor import routing_figure as heatmap
from trainer.monitor.metrics import Metrics
from trainer.monitor.routing_figure import routing_figure
from trainer.run_folder import RunFolder

SITES = ["layer-00", "layer-01", "layer-02"]


def _decisions(sites: int, tokens: int) -> torch.Tensor:
    return torch.rand(sites, tokens, generator=torch.Generator().manual_seed(1)) < 0.5


def test_panels_show_sites_upwards_and_time_to_the_right() -> None:
    densities = [[1.0, 0.9, 0.8], [0.5, 0.4, 0.3]]
    executed = _decisions(3, 200)
    figure = routing_figure(SITES, [0, 1500], densities, executed, 0.25)
    left, right, bar = figure.axes
    assert left.get_title() == "Density in greedy evaluation (target 0.25)"
    assert (left.get_xlabel(), right.get_xlabel(), bar.get_ylabel()) == (
        "optimiser step",
        "token",
        "share of tokens executed",
    )
    assert [t.get_text() for t in left.get_xticklabels()] == ["0", "1,500"]
    for axis in (left, right):
        assert [t.get_text() for t in axis.get_yticklabels()] == SITES
        assert axis.images[0].origin == "lower"
    picture = np.asarray(left.images[0].get_array())
    np.testing.assert_allclose(picture, np.array(densities).T)  # [S, E]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 1)
    assert [(t.get_position(), t.get_text()) for t in left.texts][:2] == [((0, 0), "1.00"), ((1, 0), "0.50")]
    assert "first 160 tokens" in right.get_title()
    np.testing.assert_array_equal(np.asarray(right.images[0].get_array()), executed[:, :160].numpy())


@pytest.mark.parametrize(("sites", "evaluations", "tokens"), [(1, 1, 1), (1, 30, 7), (64, 2, 300), (2, 9, 160)])
def test_any_number_of_sites_and_evaluations_can_be_drawn(sites: int, evaluations: int, tokens: int) -> None:
    names = [f"ffn-{number:02d}" for number in range(sites)]
    densities = np.random.default_rng(0).random((evaluations, sites)).tolist()
    figure = routing_figure(names, range(0, 500 * evaluations, 500), densities, _decisions(sites, tokens), 0.5)
    figure.savefig(io.BytesIO(), dpi=40)
    left, right, _ = figure.axes
    assert len(left.get_xticks()) == min(evaluations, 6) and len(right.get_yticks()) == sites
    assert len(left.texts) == (sites * evaluations if evaluations <= 8 else 0)
    assert f"first {min(tokens, 160)} tokens" in right.get_title()


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
    made.log_evaluation(4, [evaluation_of([0.7, 0.6, 0.5])])
    made.close()
    ((sites, steps, densities, executed, target),) = seen
    assert (sites, list(steps), target) == (["layer-00", "layer-01", "layer-02"], [2, 4], 0.5)
    assert [pytest.approx(d) for d in densities] == [[0.0, 0.1, 0.2], [0.7, 0.6, 0.5]]
    assert executed.shape == (3, 8) and (folder.path / "routing.png").stat().st_size > 5000


def test_images_can_be_turned_off(configure: Callable[..., PretrainConfig], world: World, folder: RunFolder) -> None:
    made = Metrics(configure("train.log.images=false"), folder, world, 3, 1e12)
    made.log_evaluation(4, [evaluation_of([0.7, 0.6, 0.5])])
    made.close()
    assert not (folder.path / "routing.png").exists()
