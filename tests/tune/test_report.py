"""The table's cells and lines up, and every number by its metric name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tune.evaluate import Accuracy, Agreement, Candidate, ExamplesEvaluation, VoteStatistics
from tune.report import answers, scalars, table


def made_up(layers: int = 2, choices: int = 4, classes: tuple[str, ...] = ("word", "end"), **fields: Any) -> Any:
    """An evaluation of 400 examples; without an ensemble if ``layers`` is 0."""
    late = [f"layer-{number:02d}" for number in range(12 - max(layers, 1), 12)]
    names = [*late, "ensemble", "oracle"] if layers else late
    candidates = []
    for place, name in enumerate(names):
        share = 0.1 + 0.8 * place / len(names)
        chosen = Accuracy(share, 0.025) if choices > 1 else None
        longer = Accuracy(share / 4, 0.02) if choices > 1 else None
        right = torch.tensor([True, place > 1])
        candidates.append(
            Candidate(
                name,
                3 - share,
                Accuracy(share / 2, 0.0125),
                chosen,
                longer,
                right,
                None if longer is None else ~right,
                share / 8,
            )
        )
    votes = None
    if layers:
        weight = torch.linspace(1, 2, (len(classes) + 1) * layers, dtype=torch.float64).view(-1, layers)
        weight = weight / weight.sum(dim=1, keepdim=True)
        counts = torch.tensor([*range(1000, 1000 + len(classes)), sum(range(1000, 1000 + len(classes)))])
        entropy = -(weight * weight.log()).sum(dim=1)
        votes = VoteStatistics(late, [*classes, "all"], counts, weight, weight.square(), entropy)
    agreement = Agreement(0.5, 0.3, 0.2) if layers else None
    of_set = {"name": "toy", "examples": 400, "choices": choices, "fewest_choices": choices, "tokens": 2001} | fields
    return ExamplesEvaluation(**of_set, candidates=candidates, agreement=agreement, votes=votes)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_shows_every_candidate_and_class() -> None:
    head, scores, agreement, _, votes = table(made_up()).split("\n\n")
    assert head.startswith("toy: 400 examples, 4 choices each, 2,001 tokens")
    lines = [_cells(line) for line in scores.split("\n")]
    accuracies = ["exact match, %", "choice accuracy, %", "by nats a token, %"]
    assert lines[0] == ["candidate", "loss, nats per token", *accuracies, "right where the final layer is wrong, %"]
    assert [line[0] for line in lines[2:]] == ["layer-10", "layer-11", "ensemble", "oracle"]
    assert lines[3] == ["layer-11", "2.7000", "15.0 ± 1.2", "30.0 ± 2.5", "7.5 ± 2.0", "3.8"]
    assert (
        "choice accuracy all late layers are right on 50.0% of the examples, only some on 30.0%, none on" in agreement
    )
    lines = [_cells(line) for line in votes.split("\n")]
    assert lines[0] == ["predicted", "tokens", "layer-10", "layer-11", "entropy, nats"]
    assert lines[2] == ["word", "1,000", "0.455 ( 21%)", "0.545 ( 30%)", "0.689"]
    assert [line[0] for line in lines[2:]] == ["word", "end", "all"]


def test_without_choices_or_an_ensemble_their_columns_and_parts_are_left_out() -> None:
    _, scores, agreement, *_ = table(made_up(choices=1)).split("\n\n")
    assert _cells(scores.split("\n")[0])[:3] == ["candidate", "loss, nats per token", "exact match, %"]
    assert "choice" not in scores and "by nats" not in scores
    assert agreement.startswith("By exact match")
    head, scores = table(made_up(layers=0, choices=1)).split("\n\n")
    assert "choices" not in head and _cells(scores.split("\n")[-1]) == ["layer-11", "2.9000", "5.0 ± 1.2"]


@pytest.mark.parametrize("layers", [0, 1, 8])
def test_columns_line_up(layers: int) -> None:
    for part in table(made_up(layers, classes=("a-rather-long-class", "b"))).split("\n\n"):
        lines = part.split("\n")
        if lines[0].startswith("|"):
            places = [[place for place, letter in enumerate(line) if letter == "|"] for line in lines]
            assert all(line == places[0] for line in places)


def test_figures_have_the_names_that_metrics_are_logged_under() -> None:
    found = scalars(made_up(), "validation")
    assert found["validation/toy/loss/layer-11"] == pytest.approx(2.7)
    assert found["validation/toy/exact_match/ensemble"] == pytest.approx(0.25)
    assert found["validation/toy/choice_accuracy/oracle"] == pytest.approx(0.7)
    assert found["validation/toy/choice_accuracy_per_token/oracle"] == pytest.approx(0.175)
    plain = {"layer-10": [1, 0], "layer-11": [1, 0], "ensemble": [1, 1], "oracle": [1, 1]}
    assert answers(made_up(choices=1)) == plain
    assert answers(made_up()) == plain | {f"{name}/per_token": [1 - x for x in right] for name, right in plain.items()}
    assert [found[f"validation/toy/layers_right/{n}"] for n in ("every", "some", "none")] == [0.5, 0.3, 0.2]
    votes = made_up().votes
    assert found["ensemble/weight/toy/layer-10"] == votes.weight[-1, 0]
    assert found["ensemble/weight/toy/layer-11/word"] == votes.weight[0, 1]
    assert found["ensemble/largest/toy/layer-11/end"] == votes.largest[1, 1]
    assert found["ensemble/entropy/toy"] == votes.entropy[-1]
    assert len(found) == 4 * 4 + 3 + 1 + 2 * 2 * 3
    assert all(type(value) is float for value in found.values())


def test_a_test_set_of_the_same_name_does_not_take_a_validation_sets_figures() -> None:
    assert not scalars(made_up(), "validation").keys() & scalars(made_up(), "test").keys()


def test_without_an_ensemble_there_are_only_the_final_layers_figures() -> None:
    assert list(scalars(made_up(layers=0, choices=1), "test")) == [
        "test/toy/loss/layer-11",
        "test/toy/exact_match/layer-11",
    ]
