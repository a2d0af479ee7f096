"""Files of token ids made elsewhere, read without detokenizing.

    flat       FILE.bin, FILE.npy, ...: the ids of all documents, an end token between them
                 nanoGPT, OLMo          nothing else in the file, whatever its name: uint16 or uint32, little-endian
                 llm.c                  after 256 int32: magic, version, number of tokens
                 numpy.save             after the header of that format, which gives dtype and byte order
    Megatron   FILE.bin and FILE.idx (Megatron-LM, GPT-NeoX): ids, and each document's place (data/megatron_index.py)
    a list     a field of JSON lines or a column of Parquet: a row is a document

Ids do not say which tokenizer made them. What can be detected is refused: ids beyond the vocabulary, no end token, a
file that is not a whole number of ids, high halves of uint32 that were read as uint16. An end token that opens
documents (llm.c) and one that closes them give the same documents. N: tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.config import TokensConfig
from data.discovery import COMPRESSIONS, format_of
from data.megatron_index import INDEX_SUFFIX, MegatronIndex
from data.remote_file import RemoteFile
from data.tokenization import TextTokenizer

LLM_C_NUMBERS = 256
LLM_C = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
"""llm.c's magic and version, and the dtype that they stand for."""
LLM_C_EVALUATION = 20240522
NPY_START = b"\x93NUMPY"
_LOOKED_AT = 1_000_000
_READ_AT_ONCE = 1 << 22
"""Tokens."""


class Vocabulary(NamedTuple):
    """What a document of ids is checked against, and made to begin and end with."""

    size: int
    """Every id is below it."""
    prefix: list[int]
    """Ids before every document."""
    eos_id: int
    """The id after every document."""

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> Vocabulary:
        return cls(tokenizer.vocab_size, tokenizer.prefix, tokenizer.eos_id)


def with_indexes(files: list[Path]) -> list[Path]:
    """``files`` with both of every Megatron pair, so that both are known by their fingerprints.

    Raises:
        ValueError: an index is without its tokens, or a flat file is at a URL.
    """
    remote = [path for path in files if isinstance(path, RemoteFile) and format_of(path) not in ("json", "parquet")]
    if remote:
        raise ValueError(
            f"{remote[0]} is a file of token ids, which is mapped into memory, so it must be on a disk; copy it to one"
        )
    pairs = [path.with_suffix(suffix) for path in files for suffix in (".bin", INDEX_SUFFIX) if _is_half(path)]
    if missing := [path for path in pairs if not path.is_file()]:
        raise ValueError(
            f"{missing[0]} is missing; a Megatron pair is {missing[0].name} and {missing[0].stem}{INDEX_SUFFIX}"
        )
    return sorted({*files, *pairs})


def _is_half(path: Path) -> bool:
    return path.suffix == INDEX_SUFFIX or (path.suffix == ".bin" and path.with_suffix(INDEX_SUFFIX).is_file())


def documents_of_file(
    path: Path, settings: TokensConfig, vocabulary: Vocabulary, first: int, end: int | None
) -> Iterator[np.ndarray]:
    """Documents ``first`` up to ``end`` of a flat file or a Megatron pair, uint32 [N], with begin and end tokens.

    Args:
        path: a flat file, or one of a pair: the ``.bin`` gives the documents, the ``.idx`` none.
        settings: what the file itself does not record.
        vocabulary: that of the tokenizer.
        first, end: numbers of documents; ``end`` None means all that follow.

    Raises:
        ValueError: the file is not what it should be.
    """
    if path.suffix == INDEX_SUFFIX:
        MegatronIndex(path)
        return
    if _is_half(path):
        index = MegatronIndex(path.with_suffix(INDEX_SUFFIX))
        documents: Iterable[np.ndarray] = (
            index.document(n) for n in range(first, index.documents)[: _count(first, end)]
        )
    else:
        stream = _flat(path, settings)
        _require_plausible(stream, vocabulary)
        documents = islice(_split(stream, _end_id(settings, vocabulary)), first, end)
    for number, ids in enumerate(documents, start=first):
        yield closed(ids, settings, vocabulary, f"document {number}")


def _count(first: int, end: int | None) -> int | None:
    return None if end is None else max(end - first, 0)


def closed(ids: Any, settings: TokensConfig, vocabulary: Vocabulary, place: str) -> np.ndarray:
    """``ids`` as a document, uint32 [N], with the tokenizer's begin and end tokens once; empty if there is no other.

    Args:
        ids: a list of integers, with or without these tokens; None gives no ids.
        settings: says which id ends documents in the source.
        vocabulary: that of the tokenizer.
        place: which document it is, in words.

    Raises:
        ValueError: it is not a list of ids of the vocabulary.
    """
    try:
        given = np.asarray([] if ids is None else ids)
    except ValueError:  # nested lists of different lengths
        given = np.empty((0, 0))
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(
            f"{place} is not a list of token ids, but {str(ids)[:60]!r}; name the field that holds them: tokens.field"
        )
    if not given.size:
        return np.empty(0, np.uint32)
    _require_ids(given, vocabulary, place)
    content = given.astype(np.uint32)
    inside = np.flatnonzero(content != _end_id(settings, vocabulary))
    content = content[inside[0] : inside[-1] + 1] if inside.size else content[:0]
    before = len(vocabulary.prefix)
    if before and content[:before].tolist() == vocabulary.prefix:
        content = content[before:]
    if not len(content):
        return content
    return np.concatenate([np.array(vocabulary.prefix, np.uint32), content, np.array([vocabulary.eos_id], np.uint32)])


def _end_id(settings: TokensConfig, vocabulary: Vocabulary) -> int:
    return vocabulary.eos_id if settings.end_id is None else settings.end_id


def _require_ids(ids: np.ndarray, vocabulary: Vocabulary, place: str) -> None:
    if int(ids.max()) < vocabulary.size and (ids.dtype.kind == "u" or int(ids.min()) >= 0):
        return
    where = int(np.argmax((ids < 0) | (ids >= vocabulary.size)))
    raise ValueError(
        f"{place} holds the id {int(ids[where])} at index {where}, but the tokenizer has {vocabulary.size:,} tokens: "
        "the ids are from another tokenizer, or have another dtype or byte order; correct data.tokenizer or the source"
    )


def _flat(path: Path, settings: TokensConfig) -> np.ndarray:
    """All tokens of a file, mapped into memory."""
    if path.suffix in COMPRESSIONS:
        raise ValueError("flat files are mapped into memory as they are; decompress it")
    with path.open("rb") as file:
        start = file.read(4 * LLM_C_NUMBERS)
    if start.startswith(NPY_START):
        return _numpys(path, settings)
    if (counted := _llm_c(start)) is not None:
        name, tokens = counted
        _require_dtype(settings, name)
        return _mapped(path, name, len(start), tokens)
    if settings.dtype is None:
        raise ValueError("it does not state its dtype; set the source's tokens.dtype to uint16 or uint32")
    return _mapped(path, settings.dtype, 0, None)


def _llm_c(start: bytes) -> tuple[str, int] | None:
    """Dtype and number of tokens as llm.c's header says them; None without one."""
    if len(start) < 4 * LLM_C_NUMBERS:
        return None
    for order in "<>":
        magic, version, tokens = np.frombuffer(start, f"{order}i4", 3).tolist()
        if magic == LLM_C_EVALUATION:
            raise ValueError("it is an llm.c evaluation set, not documents; leave it out")
        if (dtype := LLM_C.get((magic, version))) is not None:
            if order == ">":
                raise ValueError("its header (llm.c's) is big-endian; swap the bytes of the whole file")
            return dtype, tokens
    return None


def _mapped(path: Path, name: str, header_bytes: int, tokens: int | None) -> np.ndarray:
    dtype, there = np.dtype(name).newbyteorder("<"), path.stat().st_size - header_bytes
    if tokens is not None and there != tokens * dtype.itemsize:
        raise ValueError(
            f"its header (llm.c's) counts {tokens:,} tokens of {name}, but {there:,} bytes follow it; restore the file"
        )
    if there % dtype.itemsize:
        raise ValueError(
            f"it has {there:,} bytes, which is not a multiple of the size of {name}; correct tokens.dtype, or restore "
            "the file"
        )
    # As a plain array, which is cheaper to slice.
    return np.asarray(np.memmap(path, dtype, "r", header_bytes)) if there else np.empty(0, dtype)


def _numpys(path: Path, settings: TokensConfig) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"it begins like a .npy file, but is not a complete one ({error}); restore it") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"it is an array of {array.dtype.name} {list(array.shape)}; token ids must be a one-dimensional array of "
            "integers"
        )
    if array.dtype.kind == "u":
        _require_dtype(settings, array.dtype.name)
    return array


def _require_dtype(settings: TokensConfig, dtype: str) -> None:
    if settings.dtype not in (None, dtype):
        raise ValueError(f"its header says {dtype}, but tokens.dtype is {settings.dtype}; leave tokens.dtype out")


def _require_plausible(stream: np.ndarray, vocabulary: Vocabulary) -> None:
    """Check a flat file's start for signs of a wrong dtype, byte order or tokenizer."""
    start = stream[:_LOOKED_AT]
    if not len(start):
        return
    if int(start.max()) >= vocabulary.size or int(start.min()) < 0:
        others = [name for name, seen in _read_otherwise(start) if int(seen.max()) < vocabulary.size]
        hint = f"; read as {' or '.join(others)} all of them would be valid" if others else ""
        _raise_with(hint, start, vocabulary)
    if start.dtype.itemsize == 2 and len(start) >= 2:
        zeros_low, zeros_high = (float(np.mean(start[place::2] == 0)) for place in (0, 1))
        if zeros_high > 0.5 > zeros_low:
            raise ValueError(
                f"every second id is 0 ({zeros_high:.0%}), so it holds uint32 read as uint16; set tokens.dtype to "
                "uint32"
            )


def _raise_with(hint: str, start: np.ndarray, vocabulary: Vocabulary) -> None:
    try:
        _require_ids(start, vocabulary, "it")
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None


def _read_otherwise(start: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    whole = np.ascontiguousarray(start[: len(start) // 2 * 2])
    if whole.dtype.itemsize == 2:
        yield "uint32", whole.view("<u4")
    elif whole.dtype.itemsize == 4:
        yield "uint16", whole.view("<u2")
    yield f"{whole.dtype.name} of the other byte order", whole.view(whole.dtype.newbyteorder())


def _split(stream: np.ndarray, end_id: int) -> Iterator[np.ndarray]:
    """The documents of a flat file without their end tokens; one between two adjacent end tokens is empty.

    Raises:
        ValueError: there is no end token.
    """
    begun, ended = 0, False
    for first in range(0, len(stream), _READ_AT_ONCE):
        for place in (np.flatnonzero(stream[first : first + _READ_AT_ONCE] == end_id) + first).tolist():
            if place or len(stream) == 1:  # at the very start it opens the first document
                yield stream[begun:place]
            begun, ended = place + 1, True
    if len(stream) and not ended:
        raise ValueError(
            f"none of its {len(stream):,} ids is {end_id}, the end-of-document id: the ids are from another tokenizer "
            "or byte order, or documents end with another id; set the source's tokens.end_id to it"
        )
    if begun < len(stream):
        yield stream[begun:]
