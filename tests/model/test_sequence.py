"""Windows that ranks share: decisions, losses and gradients are those of whole windows."""

from __future__ import annotations

import pytest

from tests.model import sequence_worker
from tests.ranks import Processes


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_shared_window_is_the_whole_one(ranks: int) -> None:
    """Every case of tests/model/sequence_worker.py, forward and backward."""
    with Processes(sequence_worker.main, count=ranks) as processes:
        assert processes.end() == [0] * ranks, processes.output[-4000:]
