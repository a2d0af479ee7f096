"""A progress bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LOG_EVERY_S = 30.0


class Progress:
    """Counts tokens of one source; use as a context manager."""

    def __init__(self, name: str, tokens: int) -> None:
        """Start at ``tokens``, what an earlier, interrupted run had already written."""
        self._name = name
        self._tokens = tokens
        self._started_with = tokens
        self._started_s = self._logged_s = time.monotonic()
        self._bar = tqdm(desc=name, initial=tokens, unit="tok", unit_scale=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, tokens: int, file: str) -> None:
        """``tokens`` more were tokenized, the last of them from ``file``."""
        self._tokens += tokens
        self._bar.set_postfix_str(file, refresh=False)
        self._bar.update(tokens)
        now_s = time.monotonic()
        if self._bar.disable and now_s - self._logged_s >= LOG_EVERY_S:
            rate = (self._tokens - self._started_with) / (now_s - self._started_s)
            print(f"{self._name}: {self._tokens:,} tokens, {rate:,.0f} tokens/s, reading {file}", flush=True)
            self._logged_s = now_s
