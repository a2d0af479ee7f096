"""The order of samples: a bijection, exact mixtures, one number as its whole state."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.order import Mixture, Order, key_of, permute
from data.stages import Stage


def always(*weights: float) -> list[Stage]:
    """One stage, of the whole run."""
    return [Stage("", 0, weights)]


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4096, 4097, 100_003])
def test_permutation_is_a_bijection(size: int) -> None:
    moved = permute(np.arange(size), size, key_of("k", size))
    assert moved.dtype == np.int64
    np.testing.assert_array_equal(np.sort(moved), np.arange(size))


def test_permutation_of_a_large_range_needs_no_memory() -> None:
    size = 2**40 + 12345
    index = np.array([0, 1, 2, size - 1, size // 2])
    moved = permute(index, size, key_of("k"))
    assert len(set(moved.tolist())) == 5 and moved.min() >= 0 and moved.max() < size


def test_permutation_is_fixed_for_ever() -> None:
    """A change here changes every run's data order: raise ORDER_VERSION with it."""
    assert permute(np.arange(10), 10, key_of(0, "windows", "main")).tolist() == [1, 8, 9, 2, 5, 7, 0, 3, 6, 4]


def test_permutations_look_random() -> None:
    size, keys = 1000, 200
    firsts = [permute(np.arange(size), size, key_of(k)) for k in range(keys)]
    where = np.stack(firsts)
    # Each index's mean place over many keys is near the middle: std of a mean of 200 uniforms is 0.0204 of the size.
    assert abs(where.mean(axis=0) / size - 0.5).max() < 5 * 0.0204
    fixed = (where == np.arange(size)).sum(axis=1)
    assert 0.5 < fixed.mean() < 1.6, "a random permutation has one fixed point on average"
    neighbours = (np.abs(np.diff(where, axis=1)) == 1).mean()
    assert neighbours < 3 * 2 / size


def test_small_permutations_take_many_forms() -> None:
    seen = Counter(tuple(permute(np.arange(4), 4, key_of(k)).tolist()) for k in range(2400))
    assert len(seen) == 24 and max(seen.values()) < 3 * 100


@pytest.mark.parametrize(
    "weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [1, 1e-4, 5], [1 / 3] * 7, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
)
def test_mixture_is_exact_at_every_block(weights: list[float]) -> None:
    mixture = Mixture(weights, seed=3)
    size = mixture.block_samples
    blocks = 30 if size <= 1000 else 4
    source, ordinal = mixture.locate(np.arange(blocks * size))
    share = np.array(weights) / sum(weights)
    for block in range(1, blocks + 1):
        counts = np.bincount(source[: block * size], minlength=len(weights))
        np.testing.assert_array_equal(counts, mixture.counts(block))
        assert (abs(counts - share * block * size) < 1).all()
    for number in range(len(weights)):  # every source's samples come in order, none left out, none twice
        np.testing.assert_array_equal(ordinal[source == number], np.arange((source == number).sum()))


def test_mixture_is_spread_within_a_block() -> None:
    source, _ = Mixture([0.5, 0.5], seed=0).locate(np.arange(1000))
    halves = [source[:500].mean(), source[500:].mean()]
    assert max(abs(h - 0.5) for h in halves) < 0.08
    assert len(set(source[:16].tolist())) == 2


def test_weight_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="weight 1e-09 is less than a millionth"):
        Mixture([1.0, 1e-9], seed=0)


def test_every_window_once_an_epoch_for_every_source() -> None:
    order = Order(["a", "b", "c"], [7, 500, 1], always(1, 4, 0.5), seed=1)
    source, epoch, window = order.locate(np.arange(20_000))
    for number, windows in enumerate([7, 500, 1]):
        mine = source == number
        assert (np.diff(epoch[mine]) >= 0).all(), "an epoch ends before the next begins"
        for this in range(int(epoch[mine].max())):  # all but the last, unfinished one
            np.testing.assert_array_equal(np.sort(window[mine & (epoch == this)]), np.arange(windows))
    epochs = [window[(source == 1) & (epoch == e)].tolist() for e in (0, 1)]
    assert epochs[0] != epochs[1], "each epoch has its own order"


def test_any_slice_gives_the_same_samples() -> None:
    def fresh() -> Order:
        return Order(["a", "b"], [100, 333], always(0.3, 0.7), seed=5)

    whole = np.stack(fresh().locate(np.arange(5000)))
    for first, count in ((0, 1), (4999, 1), (995, 10), (1234, 700)):
        part = np.stack(fresh().locate(np.arange(first, first + count)))
        np.testing.assert_array_equal(part, whole[:, first : first + count])
    backwards = np.stack(fresh().locate(np.arange(5000)[::-1].copy()))
    np.testing.assert_array_equal(backwards[:, ::-1], whole)


def test_seed_and_name_change_the_order() -> None:
    def windows(name: str, seed: int) -> list[int]:
        return Order([name], [1000], always(1.0), seed).locate(np.arange(100))[2].tolist()

    assert windows("a", 0) == windows("a", 0)
    assert windows("a", 0) != windows("a", 1) != windows("b", 1)


def test_far_into_a_long_run() -> None:
    order = Order(["a", "b"], [10**9, 10**6], always(0.9, 0.1), seed=0)
    source, epoch, window = order.locate(np.arange(10**12, 10**12 + 100))
    assert (window >= 0).all() and (window < np.array([10**9, 10**6])[source]).all()
    assert (np.abs(epoch - np.array([900, 100_000])[source]) <= 1).all()
