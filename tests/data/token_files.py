"""Token files of others, written as their own projects document them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from data.config import DataConfig
from data.token_files import Vocabulary
from tests.data.helpers import config_of

PREFIXED = Vocabulary(100, [1, 3], 2)
"""Of a tokenizer that puts two marks before a document."""
WRITERS: dict[str, Callable[[Path, list[list[int]], int], tuple[str, dict[str, Any]]]] = {}
"""By name: writes the ids of documents, which end with ``eos``, and says which file and how it is to be read."""


def writer(function: Callable[[Path, list[list[int]], int], tuple[str, dict[str, Any]]]) -> None:
    WRITERS[function.__name__] = function


def flat(all_ids: list[list[int]]) -> list[int]:
    return [token for ids in all_ids for token in ids]


@writer
def nanogpt(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """data/openwebtext/prepare.py: a memmap of uint16, the end of text behind every document."""
    array = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(len(flat(all_ids)),))
    array[:] = flat(all_ids)
    array.flush()
    return "train.bin", {"dtype": "uint16"}


@writer
def llm_c_gpt2(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """dev/data/data_common.py: 256 int32, then uint16; dev/data/fineweb.py puts the end of text before a document."""
    tokens = flat([[eos, *ids[:-1]] for ids in all_ids])
    start = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    (folder / "fineweb_train_000001.bin").write_bytes(start + struct.pack(f"<{len(tokens)}H", *tokens))
    return "fineweb_*.bin", {}


@writer
def llm_c_llama3(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """The same file's other header: uint32."""
    tokens = flat([[eos, *ids[:-1]] for ids in all_ids])
    start = struct.pack("<256i", 20240801, 7, len(tokens), *[0] * 253)
    (folder / "shard.bin").write_bytes(start + struct.pack(f"<{len(tokens)}I", *tokens))
    return "shard.bin", {}


@writer
def olmo(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """olmo/data/memmap_dataset.py: named .npy, and yet nothing but the ids."""
    (folder / "part-00-00000.npy").write_bytes(np.array(flat(all_ids), "<u4").tobytes())
    return "part-*.npy", {"dtype": "uint32"}


@writer
def numpy_save(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """A header that names a dtype, here a big-endian one of 8 bytes; the last document is not closed."""
    np.save(folder / "tokens.npy", np.array(flat(all_ids)[:-1], ">i8"))
    return "tokens.npy", {}


def write_pair(
    folder: Path,
    sequences: list[list[int]],
    borders: list[int],
    code: int = 8,
    modes: bool = False,
    magic: bytes = b"MMIDIDX\x00\x00",
) -> Path:
    """megatron/core/datasets/indexed_dataset.py: _IndexWriter and IndexedDatasetBuilder."""
    letter = {4: "i", 5: "q", 8: "H"}[code]
    data = [struct.pack(f"<{len(ids)}{letter}", *ids) for ids in sequences]
    (folder / "my_text_document.bin").write_bytes(b"".join(data))
    starts = [sum(map(len, data[:number])) for number in range(len(data))]
    index = magic + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(borders))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(starts)}q", *starts)
    index += struct.pack(f"<{len(borders)}q", *borders) + (bytes(len(sequences)) if modes else b"")
    (folder / "my_text_document.idx").write_bytes(index)
    return folder / "my_text_document.idx"


@writer
def megatron(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """With --append-eod, a sequence for each document."""
    write_pair(folder, all_ids, list(range(len(all_ids) + 1)))
    return "*.bin", {}


@writer
def megatron_sentences(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """With --split-sentences and without --append-eod: a document is several sequences, int32, and has no mark."""
    sequences, borders = [], [0]
    for ids in all_ids:
        sequences += [ids[:3], ids[3:-1]]
        borders.append(len(sequences))
    write_pair(folder, sequences, borders, code=4, modes=True)
    return "*.idx", {}


@writer
def json_lines(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    """Half of the rows are closed."""
    rows = [ids if number % 2 else ids[:-1] for number, ids in enumerate(all_ids)]
    lines = "".join(
        json.dumps({"id": n, "input_ids": ids}) + "\n" for n, ids in enumerate([*rows[:5], None, [], *rows[5:]])
    )
    (folder / "ids.jsonl").write_text(lines)
    return "ids.jsonl", {}


@writer
def parquet(folder: Path, all_ids: list[list[int]], eos: int) -> tuple[str, dict[str, Any]]:
    column = pyarrow.array([*all_ids, None], pyarrow.list_(pyarrow.uint16()))
    pyarrow.parquet.write_table(pyarrow.table({"tokens": column}), folder / "ids.parquet", row_group_size=50)
    return "ids.parquet", {"field": "tokens"}


def given(folder: Path, files: str, tokens: dict[str, Any], tokenizer: dict[str, Any], **changes: Any) -> DataConfig:
    sources = [{"name": "main", "files": [str(folder / files)], "tokens": tokens}]
    return config_of(folder, sources=sources, tokenizer=tokenizer, **changes)
