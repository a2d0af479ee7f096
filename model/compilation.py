"""How many graphs torch.compile may make of one function."""

from __future__ import annotations

GRAPHS = 64
"""A size of 1 has a graph of its own even where sizes are symbols, as has each of training, evaluation and inference:
13 of FlexAttention in a run with tasks. Beyond the limit, 8 as torch comes, code runs uncompiled without a word."""


def raise_recompile_limit() -> None:
    """To :data:`GRAPHS` in this process, if it is lower."""
    import torch._dynamo.config as dynamo  # seconds, which what is not compiled need not wait for

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
