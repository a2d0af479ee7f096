"""The picture of an evaluation: what is where, and no label on another, whatever there is to draw."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.tune.test_report import made_up
from tune.classes import CLASSES
from tune.evaluate import Accuracy
from tune.vote_figure import vote_figure


def test_panels_show_weights_losses_and_accuracies() -> None:
    evaluation = made_up(layers=3)
    figure = vote_figure(evaluation)
    weights, loss, accuracy = figure.axes
    assert "not a model" in figure.get_supxlabel()
    assert figure.get_suptitle() == "toy\n400 examples, 2,001 tokens in the right responses"
    np.testing.assert_allclose(np.asarray(weights.images[0].get_array()), evaluation.votes.weight.numpy())
    assert weights.images[0].get_clim() == (0, 1)
    assert [t.get_text() for t in weights.get_xticklabels()] == ["09", "10", "11"]
    assert [t.get_text() for t in weights.get_yticklabels()] == ["word (1,000)", "end (1,001)", "all (2,001)"]
    assert [t.get_text() for t in weights.texts][:3] == [f"{w:.2f}" for w in evaluation.votes.weight[0].tolist()]
    names = [candidate.name for candidate in evaluation.candidates]
    assert [t.get_text() for t in loss.get_yticklabels()] == names
    assert [line.get_xdata()[0] for line in loss.lines] == [candidate.loss for candidate in evaluation.candidates]
    assert loss.get_ylim()[0] > loss.get_ylim()[1]  # the first candidate on top, as in the table
    assert (accuracy.get_title(), loss.get_title()) == ("Right among 4 choices", "Loss")
    shares = [container.lines[0].get_xdata()[0] for container in accuracy.containers]
    assert shares == [100 * candidate.accuracy.share for candidate in evaluation.candidates]
    left, right = accuracy.containers[0].lines[2][0].get_segments()[0][:, 0]
    assert right - left == pytest.approx(2 * 2.5)


def test_without_an_ensemble_there_are_no_weights() -> None:
    loss, accuracy = vote_figure(made_up(layers=0, choices=1)).axes
    assert [t.get_text() for t in loss.get_yticklabels()] == ["layer-11"]
    assert accuracy.get_title() == "Exact match"
    *_, accuracy = vote_figure(made_up(layers=0, choices=4, fewest_choices=2)).axes
    assert accuracy.get_title() == "Right among 2 to 4 choices"


def _same(evaluation: Any, share: float) -> Any:
    """The evaluation with one accuracy and one loss for all."""
    chosen = Accuracy(share, 0.0)
    candidates = [dataclasses.replace(c, loss=2.5, choice_accuracy=chosen) for c in evaluation.candidates]
    return dataclasses.replace(evaluation, candidates=candidates)


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("classes", [("word",), tuple(CLASSES)], ids=len)
def test_no_label_lies_on_another(layers: int, classes: tuple[str, ...]) -> None:
    _tidy(vote_figure(made_up(layers, classes=classes, examples=1_234_567, tokens=123_456_789)))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layers", [0, 3])
def test_candidates_that_are_all_the_same_can_be_told_apart(layers: int, share: float) -> None:
    figure = vote_figure(_same(made_up(layers), share))
    _tidy(figure)
    ticks = figure.axes[-1].get_xticks()
    assert len(ticks) >= 2 and min(ticks) >= 0 and max(ticks) <= 100


def _tidy(figure: Figure) -> None:
    """All texts inside the picture, none on another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [figure._suptitle]
    for axes in figure.axes:
        left, right = axes.get_xlim()
        # Ticks beyond the axis have labels too, which are not drawn.
        texts += [t for t, x in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True) if left <= x <= right]
        texts += axes.get_yticklabels() if axes.yaxis.get_tick_params()["labelleft"] else []
        texts += [*axes.texts, axes.title, axes.xaxis.label]
    boxes = {text: text.get_window_extent(canvas.get_renderer()) for text in texts if text.get_text()}
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, one_box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not one_box.overlaps(other_box), (one, other)
