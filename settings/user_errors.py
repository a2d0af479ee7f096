"""A user's mistake ends a command with one sentence and status 1; a bug of ours keeps its traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ``ValueError`` and ``OSError`` raised inside into ``error: <sentence>`` on stderr and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
