"""Random numbers without a generator: a hash of (seed, sample, site, position).

A token's noise depends only on its place in the data, never on the rank, the micro-batch or the draws before it. So the
same tokens get the same noise at every world size and accumulation split, recomputation under activation checkpointing
sees the same decisions, and a resumed run needs no generator state.

Dimension letters: B batch, T tokens.
"""

from __future__ import annotations

from torch import Tensor

# The mixing constants of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def uniform(seed: int, sample_ids: Tensor, site: Tensor | int, positions: Tensor) -> Tensor:
    """Numbers in the open interval (0, 1), fp32.

    Args:
        seed: the run's seed.
        sample_ids: int64 [B], the samples' global numbers.
        site: number of the routed site.
        positions: int64 [T] or [B, T], token positions within the sample.

    Returns:
        [B, T] on the device of ``positions``.
    """
    key = _mix(_mix(sample_ids * _STEP + seed) + site)
    bits = _mix(key[:, None] + positions * _STEP)
    # Half a step keeps 0 and 1 out. 23 bits, not 24: fp32 would round the largest number of 24 bits and a half up to 1.
    return (_shift_right(bits, 41).float() + 0.5) * 2.0**-23


def _mix(z: Tensor) -> Tensor:
    z = z + _STEP
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own shift of int64 keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
