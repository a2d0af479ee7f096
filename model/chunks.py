"""Chunked logits: how many tokens a chunk has, and what the losses over chunks share.

Dimension letters: V vocabulary, D width.
"""

from __future__ import annotations

from torch import Tensor

IGNORE_INDEX = -100
"""Marks a target without a loss."""
# Logits held at once, in fp32 entries. On the CPU a chunk should stay in the cache between the passes over it (8 MiB);
# on a GPU (256 MiB) few chunks matter more, because each one reads and writes the weight's fp32 gradient.
_CHUNK_LOGITS = {"cpu": 2**21, "other": 2**26}
_CHUNK_ROWS_MIN = 256  # with fewer, the products are bound by reading the weight


def chunk_rows(weight: Tensor) -> int:
    """How many tokens' logits to hold at once with a head of ``weight`` [V, D]."""
    return rows_at_once(weight.shape[0], weight.is_cpu)


def rows_at_once(vocab_size: int, on_cpu: bool) -> int:
    """The same by V and the kind of device."""
    return max(_CHUNK_LOGITS["cpu" if on_cpu else "other"] // vocab_size, _CHUNK_ROWS_MIN)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, fused where the dtypes allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
