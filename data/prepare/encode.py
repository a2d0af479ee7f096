"""Texts -> token ids, on any number of cores, with results in the order of the texts.

SentencePiece uses one process per core. A ``tokenizer.json`` uses one process, with as many of the library's own
threads: only there, since a process with such threads must not fork.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from data.sources import Document
from data.tokenization import JSON_NAME, TextTokenizer, load_text_tokenizer, tokenizer_file, use_threads

Batch = list[Document]
Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids of a batch's documents, one after another, and each document's number of tokens (int64)."""


class Encoder:
    """Encodes batches of documents on ``workers`` cores; on 1, in this process. A context manager."""

    def __init__(self, folder: str | Path, workers: int) -> None:
        """``folder`` holds the tokenizer; ``workers`` >= 1."""
        self._folder = str(folder)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers == 1:
            use_threads(1)
        else:
            processes, threads = (1, workers) if tokenizer_file(folder).name == JSON_NAME else (workers, 1)
            # Not forked: a fork would copy locks held by threads of the libraries that read the sources.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(threads,))

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Every batch with its tokens, in order; a few batches for each worker are in memory at once.

        Raises:
            ValueError: a worker was killed, which usually means that memory ran out.
        """
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        try:
            for batch in batches:
                texts = [document.text for document in batch]
                if batch[0].ids is not None:  # as in all documents of the source
                    yield batch, _given(batch)
                    continue
                if self._pool is None:
                    yield batch, _encode(self._folder, texts)
                    continue
                waiting.append((batch, self._pool.submit(_encode, self._folder, texts)))
                if len(waiting) > 3 * self._workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"a tokenizing process was killed, probably for memory; start again with fewer than {self._workers} "
                "--workers, finished shards are kept"
            ) from None


def _given(batch: Batch) -> Encoded:
    """The tokens of documents that came as token ids."""
    ids = [document.ids for document in batch if document.ids is not None]
    return np.concatenate(ids), np.array([len(one) for one in ids], np.int64)


@functools.cache
def _tokenizer(folder: str) -> TextTokenizer:
    return load_text_tokenizer(folder)


def _encode(folder: str, texts: list[bytes]) -> Encoded:
    """Tokens of ``texts``, each a document; an empty text gives no tokens."""
    return _tokenizer(folder).encode_documents([text.decode() for text in texts])


def _begin(threads: int) -> None:
    use_threads(threads)
    end_with_parent()


def end_with_parent() -> None:
    """Make a worker end when its parent is killed; it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
