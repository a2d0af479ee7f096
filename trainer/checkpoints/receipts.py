"""How the threads that write a checkpoint communicate: by files, in a folder of the checkpoint.

    receipts/
      receipt-00003.json   what rank 3 has written, with sizes and hashes
      failed-00003         rank 3 cannot write its part
      growing              rewritten as long as the checkpoint grows; removed when that is over, successful or not

Only rank 0 polls the folder: one poll is three listings and the sizes of a few files, and each receipt is read once.
The others poll the modification time of one file. So the cost of a poll on a shared file system does not grow with the
number of ranks.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.files import read_json, write_json
from trainer.checkpoints.layout import ENGINE

_FOLDER, _GROWING, _RECEIPT, _FAILED = "receipts", "growing", "receipt-", "failed-"
_POLL_S = 0.05
_SHARED_DISK_S = 30.0
"""How long a folder that rank 0 has created may take to appear on other machines."""
_SAMPLED = 8
"""How many unfinished files are sampled to see whether writing makes progress."""


def begin(partial: Path) -> Path:
    """Create the empty checkpoint ``partial`` on rank 0; return a file that shows whether another rank sees it."""
    (partial / _FOLDER).mkdir(parents=True)
    (partial / _FOLDER / _GROWING).touch()
    return partial / _FOLDER / _GROWING


def appears(path: Path) -> bool:
    """Whether ``path`` can be seen from here; a network file system may take a while to show it."""
    deadline = time.monotonic() + _SHARED_DISK_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def leave(partial: Path, rank: int, written: dict[str, Any]) -> None:
    """Report that ``rank`` has written its files; ``written``: their entries of the manifest, by name."""
    write_json(partial / _FOLDER / f"{_RECEIPT}{rank:05d}.json", written)


def leave_failure(partial: Path, rank: int) -> None:
    """Report that ``rank`` cannot write its part, if even that can be written."""
    with suppress(OSError):  # an empty file may fit on a disk where nothing else does
        (partial / _FOLDER / f"{_FAILED}{rank:05d}").touch()


def last_growth(partial: Path) -> int | None:
    """When ``partial`` last grew, in ns by the file system's clock; None if it is whole, or given up."""
    try:
        return (partial / _FOLDER / _GROWING).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def end(partial: Path) -> None:
    """Tell the waiting ranks that nothing more will be written."""
    with suppress(OSError):
        (partial / _FOLDER / _GROWING).unlink()


def remove(partial: Path) -> None:
    """Remove these files from a checkpoint that every rank has written."""
    shutil.rmtree(partial / _FOLDER)


class Collection:
    """The receipts so far, on rank 0.

    Args:
        partial: the checkpoint.
        ranks: how many write.

    Attributes:
        files: entries of the manifest, from the ranks that are done.
    """

    def __init__(self, partial: Path, ranks: int):
        self.files: dict[str, Any] = {}
        self._partial, self._ranks = partial, ranks
        self._read: set[str] = set()
        self._seen: tuple[int, int] | None = None

    def look(self) -> bool | None:
        """True once all ranks have written, False if one cannot, else None; tells the others if more was written."""
        folder = self._partial / _FOLDER
        names = os.listdir(folder)
        if any(name.startswith(_FAILED) for name in names):
            return False
        for name in names:
            if name.startswith(_RECEIPT) and name.endswith(".json") and name not in self._read:
                self.files |= read_json(folder / name)
                self._read.add(name)
        if len(self._read) == self._ranks:
            return True
        seen = len(self._read), self._sampled_bytes()
        if seen != self._seen:
            self._seen = seen
            with suppress(OSError):  # the writers report a full disk
                (folder / _GROWING).write_text(f"{seen[0]} of {self._ranks} ranks have written\n")
        return None

    def _sampled_bytes(self) -> int:
        """Total size of the first few files that no receipt names yet."""
        below = [name for name in os.listdir(self._partial) if name not in (_FOLDER, ENGINE)]
        with suppress(FileNotFoundError):
            below += [f"{ENGINE}/{name}" for name in os.listdir(self._partial / ENGINE)]
        written = sorted(name for name in below if name not in self.files)[:_SAMPLED]
        return sum((self._partial / name).stat().st_size for name in written)
