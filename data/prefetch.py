"""Load ahead in a thread, so that the next batch is ready when the step ends."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """An iterator over ``items`` that runs up to ``depth`` (at least 1) of them ahead.

    What ``items`` raises is raised in the consumer, after the items before it. To leave early, call :meth:`close`, or
    use it in a ``with``: the thread would otherwise wait for a consumer.
    """

    def __init__(self, items: Iterable[Item], depth: int) -> None:
        assert depth >= 1
        self.waited_s = 0.0
        """Seconds the consumer has waited for items that were not ready, so far: what loading costs the run."""
        self._ready: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._load, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._over:
            raise StopIteration
        try:
            kind, item = self._ready.get_nowait()
        except queue.Empty:
            started_s = time.perf_counter()
            kind, item = self._ready.get()
            self.waited_s += time.perf_counter() - started_s
        if kind == "item":
            return item  # type: ignore[return-value]
        self._over = True
        self._thread.join()
        if kind == "error":
            assert isinstance(item, BaseException)
            raise item
        raise StopIteration

    def __enter__(self) -> Prefetch[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop loading and end the thread; what was loaded ahead is dropped."""
        self._closed.set()
        self._over = True
        self._thread.join()

    def _load(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                if not self._put("item", item):
                    return
        except BaseException as error:  # any error must reach the consumer
            self._put("error", error)
            return
        self._put("end", None)

    def _put(self, kind: str, item: Item | BaseException | None) -> bool:
        """Hand over one entry; False if the consumer has closed this meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def prefetch(items: Iterable[Item], depth: int) -> Prefetch[Item]:
    """Iterate over ``items``, up to ``depth`` of them loaded ahead in a background thread."""
    return Prefetch(items, depth)
