"""A file pair of Megatron-LM or GPT-NeoX: FILE.bin, the ids of all documents, and FILE.idx, the place of each.

The index, little-endian, as ``megatron/core/datasets/indexed_dataset.py`` writes it:

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     dtype of the ids, by a code
    uint64    S, the number of sequences
    uint64    D + 1, one more than the number of documents
    int32     tokens of each sequence                       [S]
    int64     the byte of FILE.bin at which it begins       [S]
    int64     for each document its first sequence, then S  [D + 1]
    int8      the mode of each sequence, in multimodal data [S], or nothing

A document is one sequence, or several (sentences).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

INDEX_SUFFIX = ".idx"
MAGIC, OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
"""By code; 6 and 7 are floating-point numbers, in an order that differs between the two projects."""


class MegatronIndex:
    """The documents of a pair, by number."""

    def __init__(self, path: Path) -> None:
        """Read the index at ``path`` and check it against the ``.bin`` beside it.

        Raises:
            ValueError: one of the two is damaged or cut off, or they do not belong together.
        """
        tokens, content = path.with_suffix(".bin"), path.read_bytes()
        if content.startswith(OLD_MAGIC):
            raise ValueError(f"{path.name} is an index of the lazy or cached kind; write the pair again as mmap")
        if len(content) < _HEAD.size or not content.startswith(MAGIC):
            raise ValueError(f"{path.name} is not a Megatron index (it does not begin with {MAGIC!r}); restore it")
        _, version, code, sequences, borders = _HEAD.unpack_from(content)
        if version != 1:
            said = "big-endian" if version == 1 << 56 else f"of version {version}"
            raise ValueError(
                f"{path.name} is {said}, but only little-endian version 1 can be read; write the pair again"
            )
        if code not in DTYPES:
            raise ValueError(
                f"{path.name} gives its ids the dtype code {code}, which is not an integer type; restore it"
            )
        needed = _HEAD.size + 12 * sequences + 8 * borders
        if len(content) not in (needed, needed + sequences) or not borders:
            raise ValueError(
                f"{path.name} has {len(content):,} bytes, but its {sequences:,} sequences in {borders - 1:,} documents "
                f"need {needed:,}; restore it"
            )
        self._lengths = np.frombuffer(content, "<i4", sequences, _HEAD.size)
        self._starts = np.frombuffer(content, "<i8", sequences, _HEAD.size + 4 * sequences)
        self._borders = np.frombuffer(content, "<i8", borders, _HEAD.size + 12 * sequences)
        dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self._require_whole(path.name, tokens, dtype)
        there = tokens.stat().st_size // dtype.itemsize
        self._tokens = np.asarray(np.memmap(tokens, dtype, "r", shape=(there,))) if there else np.empty(0, dtype)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self._borders) - 1

    def document(self, number: int) -> np.ndarray:
        """The ids of document ``number``, in the dtype of the file, [N]."""
        first, end = int(self._borders[number]), int(self._borders[number + 1])
        size = self._tokens.dtype.itemsize
        sequences = [
            self._tokens[start // size : start // size + length]
            for start, length in zip(self._starts[first:end].tolist(), self._lengths[first:end].tolist(), strict=True)
        ]
        return sequences[0] if len(sequences) == 1 else np.concatenate([self._tokens[:0], *sequences])

    def _require_whole(self, name: str, tokens: Path, dtype: np.dtype[Any]) -> None:
        size, width = tokens.stat().st_size, dtype.itemsize
        if size % width:
            raise ValueError(
                f"{tokens.name} has {size:,} bytes, which is not a multiple of the {width} bytes of {dtype.name}; "
                "restore it"
            )
        if len(self._starts) and (
            int(self._lengths.min()) < 0 or int(self._starts.min()) < 0 or any(self._starts % width)
        ):
            raise ValueError(
                f"{name} has a negative length or offset, or an offset that is not a multiple of {width} bytes; "
                "restore it"
            )
        ends = self._starts + self._lengths.astype(np.int64) * width
        last = int(ends.max()) if len(ends) else 0
        if last > size:
            number = int(np.argmax(ends > size))
            raise ValueError(
                f"{name} points past the end of {tokens.name}: sequence {number} ends at byte {int(ends[number]):,} of "
                f"{size:,}; one of the two is truncated, or belongs to another pair"
            )
        if last < size:
            raise ValueError(
                f"{name} ends at byte {last:,} of {tokens.name}, which has {size:,}: they do not belong together, or "
                "writing was interrupted"
            )
        borders = self._borders
        if borders[0] != 0 or borders[-1] != len(self._starts) or any(np.diff(borders) < 0):
            raise ValueError(
                f"{name} has documents that do not cover the sequences in order, from the first to the last"
            )
