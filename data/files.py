"""Files that are either whole or absent: everything is written beside its name, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"
"""Suffix of a file being written. One that stays is left over from a killed command and may be deleted."""
_HASHED_AT_ONCE_BYTES = 1 << 22
"""Between two blocks a thread must reacquire the interpreter lock, and waits while another one computes in Python."""


_GRACE_S = 5.0
"""How long the processes of a killed command may keep their locks."""


def temporary_name(path: Path) -> Path:
    """Where ``path`` is written until it is whole."""
    return path.with_name(path.name + TEMPORARY)


def nearest_folder(path: Path) -> Path:
    """``path`` or the nearest existing folder above it: the disk it would be created on."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def require_new_folder(out: Path) -> None:
    """Refuse to overwrite anything.

    Raises:
        ValueError: if ``out`` exists and is not an empty folder, or its path has ``..`` or no name.
    """
    if ".." in out.parts or not out.name:
        raise ValueError(f"OUT must name a folder without '..', got {out}; give its path in full")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} already exists and is not an empty folder; nothing is overwritten, so give another one"
        )


def publish(file: BinaryIO, path: Path, content: bytes = b"") -> None:
    """Append ``content`` to ``file``, written under a temporary name; close and rename it to ``path``, durably."""
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(file.name, path)
    except OSError:  # such as a full disk, on which half a file must not stay
        with contextlib.suppress(OSError):
            file.close()
        Path(file.name).unlink(missing_ok=True)
        raise
    # The rename is stored in the folder: unless that is synced, a power failure can bring the old name back.
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_writer(folder: Path, shared: bool = False, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the exclusive right to write below ``folder``; it ends with the process, however that ends.

    Args:
        folder: to lock.
        shared: others may hold it at the same time, if they share it too.
        wait_s: how long to wait for another process to release it.

    Raises:
        ValueError: another process holds it.
    """
    handle, end_s = os.open(folder, os.O_RDONLY), time.monotonic() + wait_s
    try:
        while not _is_locked(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= end_s:
                raise ValueError(f"another command is writing to {folder}; wait until it ends, or start only one")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _is_locked(handle: int, how: int) -> bool:
    """Lock a folder, unless another process holds it."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems cannot lock a folder; a single command needs no lock
    return True


@contextlib.contextmanager
def only_holder(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file ``path``, see :func:`holding`.

    Args:
        path: of the lock file.
        refusal: how the error begins if another process holds it.

    Raises:
        ValueError: another process holds it, and does not release it.
    """
    with holding(path, _GRACE_S) as holder:
        if holder is not None:
            raise ValueError(
                f"{refusal} ({holder}); wait until it ends, or give each task parts of its own: --part I/N"
            )
        yield


@contextlib.contextmanager
def holding(path: Path, wait_s: float = 0.0) -> Iterator[str | None]:
    """Hold the lock file ``path`` and yield None, or yield its holder if another process keeps it for ``wait_s``.

    The file names its holder and is removed at the end. A killed process no longer holds it. Network file systems
    lock a file between machines (NFS 4, Lustre with ``flock``, GPFS), but not always a folder. Where a file system
    cannot lock, every process gets the lock.
    """
    handle = _lock(path)
    end_s = time.monotonic() + wait_s
    while handle is None and time.monotonic() < end_s:
        time.sleep(0.1)
        handle = _lock(path)
    if handle is None:
        yield _holder(path)
        return
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield None
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _holder(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace") or "unknown"
    return "just ended"


def _lock(path: Path) -> int | None:
    """A descriptor of the lock file, locked where the file system can; None if another process has locked it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # its last holder has just removed it: ``path`` is another file now, or none


def write_atomically(path: Path, content: bytes, shared: bool = False) -> None:
    """Put ``content`` at ``path``; a reader sees the old file or the whole new one.

    Args:
        path: of the file.
        content: all of it.
        shared: other processes may write the file at the same time; the last one wins.
    """
    name = temporary_name(path)
    if shared:
        name = name.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{TEMPORARY}")
    publish(name.open("wb"), path, content)


def open_to_others(path: Path) -> None:
    """Give a file that a library made private to its owner the usual mode of a new file under the umask."""
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_json(path: Path, content: Any, shared: bool = False) -> None:
    """Write ``content`` as indented JSON, atomically; ``shared`` as for :func:`write_atomically`."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(), shared)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not JSON, or not an object.
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
