"""Which window is sample number i: a pure function of i, so resuming needs no state and no rank needs another's.

Two steps. **Mixture**: samples come in blocks; the weights determine how many of a block's samples each source gives
(exact at every block's end, see :class:`Mixture`), and a keyed permutation spreads them over the block. So sample i is
the n-th sample of its source. A stage (``data/stages.py``) has blocks of its own, and its sources continue counting
where the previous stage ended. **Permutation**: n gives the epoch, ``n // windows``, and in each epoch a keyed
permutation of all windows gives the n-th one, so every window comes once per epoch and none is dropped.

A permutation of ``range(n)`` is never stored: a Feistel network is a bijection on a power of four that is at least n,
and a value that falls outside ``range(n)`` is sent through again until it falls inside ("cycle walking"), which keeps
it a bijection.

N: samples requested. S: sources. M: samples in a block. K: stages.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.skip_ranges import Ranges, pass_over
from data.stages import Stage

ORDER_VERSION = 1
"""Part of the data fingerprint: raise it with any change that moves a sample."""
BLOCK_SAMPLES = 1000
SMALLEST_SHARE = Fraction(1, 1_000_000)
ROUNDS = 8


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where the permutation of ``range(size)`` chosen by ``key`` sends ``index``.

    Args:
        index: int64 [N], in ``range(size)``.
        size: at least 1.
        key: uint64 [N], a key for every index, or [1] for all.

    Returns:
        int64 [N], in ``range(size)``.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.broadcast_to(key, index.shape)
    moved = _feistel(index.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(moved >= size)
    while outside.size:
        moved[outside] = _feistel(moved[outside], half_bits, keys[outside])
        outside = outside[moved[outside] >= size]
    return moved.astype(np.int64)


def key_of(*parts: object) -> np.ndarray:
    """A key, uint64 [1], from anything with a stable text form."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(value: np.ndarray, half_bits: int, key: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> bits, value & mask
    for number in range(ROUNDS):
        round_key = key + np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)
        left, right = right, left ^ (_mix(_mix(round_key) ^ right) & mask)
    return (left << bits) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: every input bit changes about half of the output bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Mixture:
    """One stage: sample number, counted from the stage's first -> source, and ordinal of the sample in it.

    Source s has given ``round(W_s n) - round(W_{s-1} n)`` samples when n samples, a whole number of blocks, are done
    (W: cumulative shares). These add up to n, and each differs from its share of n by less than 1. A source of weight 0
    does not affect the others.
    """

    def __init__(self, weights: Sequence[float], seed: int, number: int = 0, name: str = "") -> None:
        """``number`` and ``name`` of the stage. Raises ValueError if a weight is below a millionth of their sum."""
        exact = [Fraction(weight) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        smallest = min(share for share in self.shares if share)
        if smallest < SMALLEST_SHARE:
            least = min(weight for weight in weights if weight)
            where = f"data.stages: '{name}'" if name else "data.sources"
            raise ValueError(
                f"{where}: weight {least} is less than a millionth of the sum of weights {sum(weights)}; "
                "raise it, or leave that source out"
            )
        # Above 2 / share no source's count can go down from one block to the next.
        self.block_samples = max(BLOCK_SAMPLES, -int(-2 // smallest))
        self._cumulative = [sum(self.shares[: s + 1], Fraction(0)) for s in range(len(self.shares))]
        self._key = (seed, "mixture") if number == 0 else (seed, "mixture of stage", number)
        self._cached_block = functools.lru_cache(maxsize=4)(self._block)

    def counts(self, block: int) -> np.ndarray:
        """Samples each source has given before ``block``: int64 [S]."""
        half = Fraction(1, 2)
        reached = [int(share * block * self.block_samples + half) for share in self._cumulative]
        return np.diff(np.array([0, *reached], np.int64))

    def given(self, samples: int) -> np.ndarray:
        """Samples each source has given when ``samples`` are done, which may end within a block: int64 [S]."""
        block, rest = divmod(samples, self.block_samples)
        counts = self.counts(block)
        return counts + np.bincount(self._cached_block(block)[0][:rest], minlength=len(counts)) if rest else counts

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and ordinal in it of every sample: int64 [N] -> int64 [N], int64 [N]."""
        source, ordinal = np.empty_like(sample_ids), np.empty_like(sample_ids)
        blocks = sample_ids // self.block_samples
        for block in np.unique(blocks).tolist():
            here = blocks == block
            sources, ordinals = self._cached_block(block)
            place = sample_ids[here] - block * self.block_samples
            source[here], ordinal[here] = sources[place], ordinals[place]
        return source, ordinal

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and ordinal of every sample of one block: int64 [M], int64 [M]."""
        before = self.counts(block)
        shuffled = permute(np.arange(self.block_samples), self.block_samples, key_of(*self._key, block))
        given = self.counts(block + 1) - before
        sources = np.searchsorted(np.cumsum(given), shuffled, side="right")
        # A source's ordinals rise along the block, so that it ends one epoch before it begins the next.
        ordinals = np.empty(self.block_samples, np.int64)
        order = np.argsort(sources, kind="stable")
        ordinals[order] = np.concatenate([b + np.arange(g) for b, g in zip(before, given, strict=True)])
        return sources, ordinals


class StagedMixture:
    """All stages: sample number -> source, and ordinal of the sample in it since the start of the run."""

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        """Raises ValueError as :class:`Mixture`."""
        self._firsts = np.array([stage.first for stage in stages], np.int64)
        self._mixtures = [Mixture(stage.weights, seed, number, stage.name) for number, stage in enumerate(stages)]
        lengths = np.diff(self._firsts).tolist()
        given = [mixture.given(length) for mixture, length in zip(self._mixtures, lengths, strict=False)]
        self._before = np.cumsum([np.zeros(len(stages[0].weights), np.int64), *given], axis=0)
        """int64 [K, S], samples that each source has given before each stage."""

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and ordinal in it of every sample: int64 [N] -> int64 [N], int64 [N]."""
        source, ordinal = np.empty_like(sample_ids), np.empty_like(sample_ids)
        stages = np.searchsorted(self._firsts, sample_ids, side="right") - 1
        for number in np.unique(stages).tolist():
            here = stages == number
            source[here], within = self._mixtures[number].locate(sample_ids[here] - self._firsts[number])
            ordinal[here] = self._before[number][source[here]] + within
        return source, ordinal

    def taken(self, consumed: int, skip_ranges: Ranges = ()) -> np.ndarray:
        """Samples that a run of ``consumed`` takes from each source in each stage: int64 [K, S]."""
        end = int(pass_over(np.array([consumed - 1]), skip_ranges)[0]) + 1
        taken = self._given(end)
        for first, stop in skip_ranges:
            if first < end:
                taken -= self._given(stop) - self._given(first)
        return taken

    def _given(self, end: int) -> np.ndarray:
        """How many of the samples below ``end`` are from each source in each stage: int64 [K, S]."""
        ends = [*self._firsts[1:].tolist(), end]
        parts = zip(self._mixtures, self._firsts.tolist(), ends, strict=True)
        return np.stack([mixture.given(max(min(stop, end) - first, 0)) for mixture, first, stop in parts])


class Order:
    """Sample number -> source, epoch and window."""

    def __init__(self, names: Sequence[str], windows: Sequence[int], stages: Sequence[Stage], seed: int) -> None:
        """One name and number of windows (at least 1) for every source, and its weight in every stage."""
        self.mixture = StagedMixture(stages, seed)
        self._windows = np.array(windows, np.int64)
        self._keys = [key_of(seed, "windows", name) for name in names]

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, epoch and window of every sample: int64 [N] -> three int64 [N]."""
        source, ordinal = self.mixture.locate(sample_ids)
        epoch = ordinal // self._windows[source]
        place = ordinal % self._windows[source]
        window = np.empty_like(sample_ids)
        for number in np.unique(source).tolist():
            here = source == number
            # Mixed, because neighbouring epochs must not have neighbouring keys.
            key = _mix(self._keys[number] + epoch[here].astype(np.uint64))
            window[here] = permute(place[here], int(self._windows[number]), key)
        return source, epoch, window
