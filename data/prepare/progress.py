"""A progress bar on a terminal, periodic plain lines in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LOG_EVERY_S = 30.0


class Progress:
    """Counts tokens, or another unit, as they are made; use as a context manager."""

    def __init__(self, name: str, unit: str = "tokens") -> None:
        self._name, self._unit = name, unit
        self._count = 0
        self._started_s = self._logged_s = time.monotonic()
        self._bar = tqdm(desc=name, unit=f" {unit}", unit_scale=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int, now: str) -> None:
        """``count`` more are done; ``now`` says where the work is, such as the file being read."""
        self._count += count
        self._bar.set_postfix_str(now, refresh=False)
        self._bar.update(count)
        now_s = time.monotonic()
        if self._bar.disable and now_s - self._logged_s >= LOG_EVERY_S:
            rate = self._count / (now_s - self._started_s)
            print(f"{self._name}: {self._count:,} {self._unit}, {rate:,.0f} {self._unit}/s, {now}", flush=True)
            self._logged_s = now_s
