"""Files that are either whole or absent: everything is written beside its name, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"
"""Suffix of a file being written. Whatever carries it is left over from a killed command and may be deleted."""
_HASHED_AT_ONCE_BYTES = 1 << 22
"""Between two blocks a thread asks for the interpreter lock, and waits for it where another one computes in Python."""


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written until it is whole."""
    return path.with_name(path.name + TEMPORARY)


def folder_around(path: Path) -> Path:
    """The innermost folder around ``path`` that there is: on whose disk it would come to be."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def publish(file: BinaryIO, path: Path) -> None:
    """Close ``file``, which was written under ``temporary_name(path)``, and give it its name, durably."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(temporary_name(path), path)
    # The rename itself lives in the folder: without this a power cut can bring the old name back.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the only right to write below ``folder``; it ends with the process, however that ends.

    Raises:
        ValueError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"another command is writing to {folder}; wait for its end, or start only one") from None
    except OSError:
        pass  # some network file systems cannot lock a folder; a single command needs no lock
    try:
        yield
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``; a reader sees the old file or the whole new one."""
    file = temporary_name(path).open("wb")
    file.write(content)
    publish(file, path)


def open_to_others(path: Path) -> None:
    """Give a file that a library wrote for its owner alone the mode that the umask leaves a new file."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not JSON, or holds something else than an object.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it is damaged, so restore it or prepare again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; restore it or prepare again")
    return content


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
