"""Remote locations: buckets and whatever else fsspec reaches, by URLs such as ``s3://bucket/run``.

Credentials, endpoints and regions are configured as each service's own library does: environment variables, its files.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from settings import did_you_mean, one_line
from settings.project import ROOT, program_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_T = TypeVar("_T")
_MARK = "://"
_LOCAL = ("file", "local")
REFUSALS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors that are not retried: permissions, and missing buckets."""
ATTEMPTS = 4
FIRST_PAUSE_S = 1.0


def is_url(name: str) -> bool:
    """Whether ``name`` is a URL, not a path."""
    return _MARK in name


def require_reachable(url: str, what: str) -> None:
    """Refuse a URL whose protocol is not supported here; does not use the network.

    Args:
        url: to check.
        what: what the URL is, for the message: a field of a config.

    Raises:
        ValueError: the protocol is not known, or the package that implements it is not installed.
    """
    from fsspec import get_filesystem_class
    from fsspec.registry import known_implementations

    protocol, mark, rest = url.partition(_MARK)
    if not mark or not rest.strip("/"):
        raise ValueError(f"{what} must be a URL such as s3://bucket/folder, got '{url}'; correct it")
    if "::" in rest:
        raise ValueError(
            f"{what} {url} contains '::', which chains file systems in fsspec, so {url.partition('::')[0]} would be "
            "used; give one without it"
        )
    try:
        get_filesystem_class(protocol)
    except ValueError:
        hint = did_you_mean(protocol, sorted(known_implementations))
        raise ValueError(f"{what} {url}: the protocol '{protocol}' is not known; {hint}") from None
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        lock = shlex.quote(os.path.relpath(ROOT / "requirements.lock"))
        raise ValueError(
            f"{what} {url}: {package}, which reads and writes there, is not installed; install it with: "
            f"{program_path('python')} -m pip install {package} --constraint {lock}"
        ) from None


def open_filesystem(url: str, remember: bool = False) -> tuple[AbstractFileSystem, str]:
    """The file system of ``url``, and the place there; listings are cached in this process only if asked."""
    from fsspec.core import url_to_fs

    local = {"auto_mkdir": True} if url.partition(_MARK)[0] in _LOCAL else {}
    system, place = url_to_fs(url, use_listings_cache=remember, **local)
    return system, str(place).rstrip("/")


def with_retries(attempt: Callable[[], _T], attempts: int = ATTEMPTS, pause_s: float = FIRST_PAUSE_S) -> _T:
    """What ``attempt`` returns, tried ``attempts`` times with pauses that double; ``REFUSALS`` are not retried."""
    for _ in range(attempts - 1):
        try:
            return attempt()
        except REFUSALS:
            raise
        except Exception:  # each service has classes of its own for a network that is down
            time.sleep(pause_s)
            pause_s *= 2
    return attempt()


def reason(error: BaseException) -> str:
    """Why a place could not be reached, on one line."""
    kind, message = type(error).__name__, one_line(error)
    return kind if message == kind else f"{kind}: {message}"


def is_refusal(error: BaseException) -> bool:
    """True for what the user has to fix: permissions, names, missing credentials."""
    return isinstance(error, REFUSALS) or "Credentials" in type(error).__name__


def entries(system: Any, place: str) -> list[str]:
    """Names directly below ``place``; none if it does not exist."""
    try:
        return [str(found).rstrip("/").rpartition("/")[2] for found in system.ls(place, detail=False)]
    except FileNotFoundError:
        return []


def require_empty(url: str, what: str) -> None:
    """Refuse a place that cannot be reached, or is not empty.

    Args:
        url: to check.
        what: what the URL is, for the message.

    Raises:
        ValueError: with what to do.
    """
    require_reachable(url, what)
    system, place = open_filesystem(url)
    try:
        there = with_retries(lambda: entries(system, place))
    except Exception as error:  # each service has classes of its own
        raise ValueError(f"{what} {url} cannot be used ({reason(error)}); {remedy(error)}") from error
    if there:
        raise ValueError(f"{what} {url} already holds {there[0]}; give an empty place, or remove what is there")


def copy_folder(folder: Path, url: str, last: str) -> None:
    """Copy all files below ``folder`` to ``url``; the file ``last`` after all others, to mark them complete.

    Raises:
        ValueError: if the copy fails; the folder stays as it was.
    """
    system, place = open_filesystem(url)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.name == last, path))
    try:
        for path in files:
            target = f"{place}/{path.relative_to(folder)}"
            with_retries(partial(system.put_file, str(path), target))
    except Exception as error:  # each service has classes of its own
        raise ValueError(
            f"{folder} is complete, but its copy at {url} is not ({reason(error)}); {remedy(error)}, and copy it there"
        ) from error


def remedy(error: BaseException) -> str:
    """What a user can do about ``error``."""
    return "grant access to it or correct the name" if is_refusal(error) else "check the network and the service"
