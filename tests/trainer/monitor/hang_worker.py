"""Stage one whose last rank hangs while it loads data for step 4: ``tests.trainer.monitor.hang_worker HOW CONFIG ...``.

HOW is ``read``, a read that never returns, or ``native``, code that never returns and holds the interpreter lock.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence

from data.batches import Batch, TrainingData
from pretrain.train import main

HANG_AT_SAMPLE = 3 * 8


def _hang(how: str) -> None:
    if how == "read":
        os.read(os.pipe()[0], 1)
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # PyDLL keeps the lock; no signal ends a mutex
    while True:
        libc.pthread_mutex_lock(mutex)


if __name__ == "__main__":
    how = sys.argv.pop(next(n for n, word in enumerate(sys.argv) if word in ("read", "native")))
    batch = TrainingData.batch

    def hanging(self: TrainingData, consumed: Sequence[int] | range) -> Batch:
        """The samples, unless this is where it hangs."""
        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1) and consumed[0] >= HANG_AT_SAMPLE:
            _hang(how)
        return batch(self, consumed)

    TrainingData.batch = hanging  # type: ignore[method-assign]
    raise SystemExit(main())
