"""How many graphs torch.compile may make of one function."""

from __future__ import annotations

GRAPHS = 64
"""A size of 1 has a graph of its own even with symbolic sizes, as has each of training, evaluation and inference: 13 of
FlexAttention in a run with tasks. Beyond the limit, torch's default of 8, code silently runs uncompiled."""


def raise_recompile_limit() -> None:
    """Raise the limit to :data:`GRAPHS` in this process, if it is lower."""
    import torch._dynamo.config as dynamo  # takes seconds, so only when compiling

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
