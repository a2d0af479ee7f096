"""Parts: sections of a source, each prepared by itself, by any process of any machine.

How a source is cut depends only on its files and ``data.part_bytes``, so the shards are the same for any number of
tasks that share the parts. A source of one part is stored in its own folder; of several, each part has a folder:

train/NAME/
  progress.json          what all parts must agree on; until the source is complete
  part-00000/            as a source of one part: shards, progress.json, manifest.json
  part-00001/            ...
  manifest.json          the parts' manifests joined, written last
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.sources import Cursor, Source

Report = Callable[[int, str], object]
"""Progress callback: how much more is done, and what is being read."""


@dataclass(frozen=True)
class Part:
    """A section of one source.

    Attributes:
        source: what it is a section of.
        source_folder: where the source's manifest goes.
        number, of: this part among all of the source.
        start, end: its documents, from ``start`` up to ``end``.
        bytes: of its files as stored, compressed or not.
        common: what all parts of the source must be made with: tokenizer, settings.
    """

    source: Source
    source_folder: Path
    number: int
    of: int
    start: Cursor
    end: Cursor
    bytes: int
    common: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its shards and its manifest go."""
        return self.source_folder if self.of == 1 else self.source_folder / f"part-{self.number:05d}"

    def made_from(self) -> dict[str, Any]:
        """Whatever must be the same for another run to give the same shards; opens the part's files."""
        files = self.source.identity(self.start.file, self.end.file + (self.end.document > 0))
        if self.of == 1:
            return {**self.common, **files}
        place = {"number": self.number, "of": self.of, "start": list(self.start), "end": list(self.end)}
        return {**self.common, **files, "part": place}


def cut(source: Source, folder: Path, part_bytes: int, common: dict[str, Any]) -> list[Part]:
    """All parts of a source, in its order.

    A part ends before the file, or the row group of a Parquet file, that would take it above ``part_bytes``; a larger
    file that cannot be cut is a part by itself.

    Raises:
        ValueError: a file cannot be read.
    """
    pieces = list(source.pieces(part_bytes))
    starts: list[Cursor] = []
    sizes: list[int] = []
    for start, size in pieces:
        if not starts or sizes[-1] + size > part_bytes:
            starts.append(start)
            sizes.append(0)
        sizes[-1] += size
    ends = [*starts[1:], Cursor(pieces[-1][0].file + 1, 0)]
    return [
        Part(source, folder, number, len(starts), start, end, size, common)
        for number, (start, end, size) in enumerate(zip(starts, ends, sizes, strict=True))
    ]


def share(parts: Sequence[Part], task: int, tasks: int) -> list[Part]:
    """The parts of ``task`` among ``tasks``, about equally many bytes each; every part belongs to exactly one task."""
    loads = [0] * tasks
    mine = []
    for part in sorted(parts, key=lambda part: -part.bytes):  # stable: the same order for every task
        lightest = loads.index(min(loads))
        loads[lightest] += part.bytes + 1
        if lightest == task:
            mine.append(part)
    return mine
