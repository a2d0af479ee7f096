"""Random access to many files with few descriptors: the least recently used one is closed.

A run may read from ten thousand shards, but a process may only have a thousand files open. Nothing is memory-mapped, so
a file truncated while it is read raises an error with its name, instead of killing the process by SIGBUS.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

KEPT = 64
"""Descriptors that stay open, for all sources of a process together."""
_BLOCK = 512
"""Entries that a search reads at once: 4 KiB."""


class OpenFiles:
    """At most ``kept`` open descriptors, by path. Thread-safe."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, start: int, size: int) -> bytes:
        """``size`` bytes from byte ``start`` on.

        Raises:
            ValueError: the file ends before.
            OSError: it cannot be opened or read.
        """
        with self._lock:
            parts = []
            descriptor = self._descriptor(path)
            while size and (part := os.pread(descriptor, size, start)):
                parts.append(part)
                start, size = start + len(part), size - len(part)
        if size:
            raise ValueError(f"{path} ends at byte {start}, {size} bytes before what its manifest says")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def forget(self, path: str) -> None:
        """Close ``path``, to be opened again at the next use: a new file has its name."""
        with self._lock:
            descriptor = self._open.pop(path, None)
            if descriptor is not None:
                os.close(descriptor)

    def _descriptor(self, path: str) -> int:
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        while len(self._open) >= self._kept:
            os.close(self._open.popitem(last=False)[1])
        descriptor = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return descriptor


SHARED = OpenFiles()
"""For all stores of this process."""


class Column:
    """A file of numbers of one dtype.

    Args:
        path: of the file.
        dtype: of a number.
        count: how many there are.
    """

    def __init__(self, path: str, dtype: np.dtype[Any], count: int) -> None:
        self.path, self._dtype, self._count = path, dtype, count

    def __len__(self) -> int:
        return self._count

    def part(self, start: int, end: int) -> np.ndarray:
        """Entries ``start`` up to ``end``: [end - start]."""
        width = self._dtype.itemsize
        return np.frombuffer(SHARED.read(self.path, start * width, (end - start) * width), self._dtype)

    def place(self, value: int) -> int:
        """Where ``value`` would be inserted, before its equals, in a sorted column."""
        low, high = 0, self._count
        while high - low > _BLOCK:
            middle = (low + high) // 2
            if int(self.part(middle, middle + 1)[0]) < value:
                low = middle + 1
            else:
                high = middle
        return low + int(np.searchsorted(self.part(low, high), value))
