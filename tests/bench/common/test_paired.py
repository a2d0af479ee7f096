"""Exact tests against counts by hand and against the binomial distribution."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from bench.common.paired import by_examples, by_signs


def test_signs_by_hand() -> None:
    """Of the eight patterns of 1, 2, 4 only all plus and all minus reach 7; all of them reach 1."""
    assert by_signs([1.0, 2.0, 4.0]).p == 2 / 8
    assert by_signs([1.0, 2.0, -4.0]).p == 1.0
    assert by_signs([-1.0, 2.0, 4.0]).p == 4 / 8
    found = by_signs([-0.1, -0.3])
    assert found.mean == pytest.approx(-0.2) and found.error == pytest.approx(0.1) and found.p == 0.5
    assert found.sentence() == "-2.0 standard errors, p 0.5"
    assert by_signs([0.3]) == (0.3, None, 1.0) and by_signs([0.3]).sentence() == "p 1"


def test_signs_are_all_counted() -> None:
    drawn = random.Random(0)
    differences = [drawn.gauss(0.3, 1) for _ in range(9)]
    extreme = sum(
        abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) >= abs(math.fsum(differences)) - 1e-12
        for signs in itertools.product((1, -1), repeat=9)
    )
    assert by_signs(differences).p == extreme / 2**9


def test_equal_differences_in_another_order_of_adding() -> None:
    """0.1 + 0.2 + 0.3 differs from 0.3 + 0.2 + 0.1 in the last bit; both are the observed sum."""
    assert by_signs([0.1, 0.2, 0.3]).p == by_signs([0.3, 0.2, 0.1]).p == 2 / 8


def test_signs_of_many_pairs_are_drawn() -> None:
    """As near the exact share as a hundred thousand draws are."""
    drawn = random.Random(1)
    few = [drawn.gauss(0.3, 1) for _ in range(20)]
    many = by_signs([*few, 0.0])  # a pair that is equal changes no share
    assert many.p == pytest.approx(by_signs(few).p, abs=0.006) and many == by_signs([*few, 0.0])
    assert by_signs([1.0] * 40).p == pytest.approx(1e-5, rel=0.01)


def test_no_pairs() -> None:
    with pytest.raises(ValueError, match="takes at least 1 pair, got none"):
        by_signs([])


def test_the_bootstraps_interval_covers_what_it_should() -> None:
    """Of 200 tables with effects of seeds and of examples about 95 % of the intervals hold the mean."""
    drawn = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        table = 0.3 + 0.1 * drawn.standard_normal((12, 1)) + drawn.standard_normal((12, 80))
        mean, low, high = by_examples(table.tolist(), 400)
        assert low <= mean <= high
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 200


def test_one_seed_and_no_difference() -> None:
    assert by_examples([[0.0] * 5]) == (0.0, 0.0, 0.0)
    mean, low, high = by_examples([[1.0, 0.0, 0.0, -1.0, 1.0]])
    assert mean == pytest.approx(0.2) and low < 0 < high
