"""Texts -> token ids, on as many processes as wanted, results in the order of the texts."""

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
import sentencepiece

from data.sources import Document
from data.tokenizer import load_tokenizer

PART_CHARACTERS = 32_768
"""A long document is encoded in parts of about this size: SentencePiece takes far more memory than text at once."""

Batch = list[Document]
Encoded = tuple[np.ndarray, np.ndarray]
"""Token ids of a batch's documents, one after another, and each document's number of tokens (int64)."""


class Encoder:
    """Encodes batches of documents with ``workers`` processes; with 1, in this process. A context manager."""

    def __init__(self, folder: str | Path, workers: int) -> None:
        """``folder`` holds ``tokenizer.model``; ``workers`` >= 1."""
        self._folder = str(folder)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Fresh processes: a fork would copy the threads' locks of the libraries that read the sources.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)

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


def encode_document(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Ids of ``text`` without any mark at its ends."""
    if len(text) <= PART_CHARACTERS:
        return tokenizer.encode(text)
    return [token for part in _parts(text) for token in tokenizer.encode(part)]


def _parts(text: str) -> Iterator[str]:
    """Cuts of ``text`` after line breaks. A line break is a piece of its own, so BPE gives the same ids as uncut."""
    start = 0
    while start < len(text):
        line_end = text.find("\n", start + PART_CHARACTERS)
        end = len(text) if line_end < 0 else line_end + 1
        yield text[start:end]
        start = end


@functools.cache
def _tokenizer(folder: str) -> sentencepiece.SentencePieceProcessor:
    return load_tokenizer(folder)


def _encode(folder: str, texts: list[bytes]) -> Encoded:
    """Tokens of ``texts``, each closed with EOS; an empty text gives no token at all."""
    tokenizer = _tokenizer(folder)
    documents = [[*encode_document(tokenizer, text.decode()), tokenizer.eos_id()] if text else [] for text in texts]
    lengths = np.array([len(document) for document in documents], np.int64)
    tokens = np.fromiter((token for document in documents for token in document), np.uint32, int(lengths.sum()))
    return tokens, lengths


def _end_with_parent() -> None:
    """Make a worker end when its parent is killed; it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
