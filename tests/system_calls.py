"""Counts the calls by which this process asks a file system about names: what a shared one serves to all ranks."""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

_CALLS = ("stat", "lstat", "listdir", "scandir", "open", "rename", "replace", "unlink", "mkdir", "rmdir", "utime")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The calls made inside, by name; ``open`` of ``io`` and of ``os`` together."""
    counts: Counter[str] = Counter()

    def counting(name: str, call: Any) -> Any:
        def counted_call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        return counted_call

    patches = [mock.patch.object(os, name, counting(name, getattr(os, name))) for name in _CALLS]
    opened = counting("open", io.open)
    patches += [mock.patch.object(module, "open", opened) for module in (io, builtins)]
    try:
        for patch in patches:
            patch.start()
        yield counts
    finally:
        for patch in reversed(patches):
            patch.stop()
