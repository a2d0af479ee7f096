"""A file at a URL, such as ``s3://bucket/part-01.jsonl.zst``, that is read like a local file.

The code that reads a source's files uses their names, asks for their sizes and opens them; here these three go through
fsspec. Nothing is kept on the disk: what is read twice is fetched twice.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from pathlib import PosixPath
from typing import Any, cast

from data import urls

_BUFFER_BYTES = 1 << 20


class RemoteFile(PosixPath):
    """Its URL as a path. Whatever asks the operating system for it (links, modes, memory maps) does not find it."""

    def __str__(self) -> str:
        protocol, _, place = super().__str__().partition(":/")
        return f"{protocol}://{place}"

    def open(self, mode: str = "r", *_: Any, **__: Any) -> Any:
        """Its bytes, buffered; ``mode`` is ``rb``."""
        assert mode == "rb", "a file at a URL is only read"
        system, place = urls.open_filesystem(str(self), remember=True)
        return io.BufferedReader(cast(io.RawIOBase, system.open(place, "rb")), _BUFFER_BYTES)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Its size; and as the inode that tells files apart, a hash of the URL.

        Raises:
            OSError: the service does not say how large it is.
        """
        system, place = urls.open_filesystem(str(self), remember=True)
        size = system.size(place)
        if size is None:
            raise OSError(f"{self}: the service does not report its size; copy it to a disk")
        number = int(hashlib.sha256(str(self).encode()).hexdigest()[:15], 16)
        return os.stat_result((stat.S_IFREG | 0o444, number, 0, 1, 0, 0, int(size), 0, 0, 0))


def find_remote(pattern: str) -> list[str]:
    """URLs of the files that ``pattern`` matches, itself a URL, sorted; none if there is no such file.

    Raises:
        ValueError: its protocol is not supported here, or the service does not allow listing.
    """
    urls.require_reachable(pattern, "files:")
    system, place = urls.open_filesystem(pattern, remember=True)

    def look() -> list[str]:
        if system.isfile(place):
            return [place]
        found = cast(dict[str, dict[str, Any]], system.glob(place, detail=True))
        files = sorted(name for name, entry in found.items() if entry["type"] == "file")
        if not files:  # a pattern skips what may not be listed; this raises
            system.ls(re.split(r"[*?[]", place)[0].rpartition("/")[0], detail=False)
        return files

    try:
        return [system.unstrip_protocol(name) for name in urls.with_retries(look)]
    except FileNotFoundError:
        return []
    except Exception as error:  # each service has classes of its own
        raise ValueError(f"files: {pattern} cannot be listed ({urls.reason(error)}); {urls.remedy(error)}") from error
