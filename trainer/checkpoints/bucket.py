"""A run's checkpoints in a bucket, or at any other URL: list them, copy them there and back.

URL/
  config.yaml             the run's config
  metrics.jsonl           as it was when the newest checkpoint was copied
  starts.txt              ids of the starts of the run that have written here: see ownership.py
  step-00001000/...       as in the run folder (layout.py), manifest.json copied last
  step-00002000/          without a manifest: not whole, or set aside because the run was rewound to before it

Buckets have no renames, so the manifest alone makes a checkpoint whole: it is written last and removed first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data import urls
from trainer.checkpoints import manifest
from trainer.checkpoints.layout import CONFIG, STARTS, finished_names, step_of
from trainer.checkpoints.retention import no_longer_kept

_AT_ONCE = 8
"""Files that are copied concurrently, where the service's library can."""
_TRIED = "tried-by-doctor"
_ASIDE = "manifest.set-aside.json"


class TornCheckpointError(Exception):
    """A checkpoint of the run folder is not whole, or no longer there."""


class Bucket:
    """The checkpoints at a URL. Every method may raise any error of the service's library."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system, self._place = urls.open_filesystem(url)

    def whole(self) -> list[str]:
        """Names of the checkpoints that have a manifest, newest first."""
        return [name for name in self._names() if self._system.exists(self._at(name, manifest.NAME))]

    def write_config(self, config: str) -> None:
        """Write the run's config there, which also shows whether writing is allowed."""
        self._system.pipe_file(f"{self._place}/{CONFIG}", config.encode())

    def starts(self) -> list[str]:
        """Ids of the starts that have written there, newest last."""
        try:
            return str(self._system.cat_file(f"{self._place}/{STARTS}").decode()).split()
        except FileNotFoundError:
            return []

    def write_starts(self, content: bytes) -> None:
        """Write the run folder's file of all starts there."""
        self._system.pipe_file(f"{self._place}/{STARTS}", content)

    def try_writing(self) -> None:
        """Write a small file there, and remove it."""
        self._system.pipe_file(f"{self._place}/{_TRIED}", b"to be removed\n")
        self._system.rm_file(f"{self._place}/{_TRIED}")

    def put_beside(self, path: Path) -> None:
        """Copy a file of the run folder there, if there is one."""
        if path.is_file():
            self._system.put_file(str(path), f"{self._place}/{path.name}")

    def get_beside(self, path: Path) -> None:
        """Copy it back, if it exists there and not locally."""
        if not path.exists() and self._system.exists(f"{self._place}/{path.name}"):
            self._system.get_file(f"{self._place}/{path.name}", str(path))

    def manifest_bytes(self, name: str) -> bytes | None:
        """The manifest of checkpoint ``name`` as stored there; None if it has none."""
        try:
            return bytes(self._system.cat_file(self._at(name, manifest.NAME)))
        except FileNotFoundError:
            return None

    def has(self, checkpoint: Path) -> bool:
        """Whether exactly this checkpoint is there, and whole."""
        return self.manifest_bytes(checkpoint.name) == _own_files(checkpoint)[0]

    def put(self, checkpoint: Path, done: set[str], given_up: Callable[[], bool]) -> bool:
        """Copy a checkpoint there, its manifest last; False if given up on the way.

        Args:
            checkpoint: the folder of a whole checkpoint.
            done: files that an earlier attempt has copied, which are skipped; new ones are added.
            given_up: whether to give up; called between files.

        Raises:
            TornCheckpointError: if the checkpoint's files do not, or no longer, match its manifest.
        """
        name = checkpoint.name
        content, files = _own_files(checkpoint)
        for old in () if done else (manifest.NAME, _ASIDE):  # of another history of the run
            if self._system.exists(self._at(name, old)):
                self._system.rm_file(self._at(name, old))
        for some in _groups([file for file in files if file not in done]):
            if given_up():
                return False
            try:
                self._system.put([str(checkpoint / file) for file in some], [self._at(name, file) for file in some])
            except FileNotFoundError:
                _own_files(checkpoint)  # raises if the checkpoint was pruned before it was marked as held
                raise
            for file in some:
                size = self._system.size(self._at(name, file))
                if size != files[file]["bytes"]:
                    raise OSError(f"{file} has {size} bytes there instead of {files[file]['bytes']}")
            done.update(some)
        self._system.pipe_file(self._at(name, manifest.NAME), content)
        return True

    def get(self, name: str, file: str, target: Path) -> None:
        """Copy one file of checkpoint ``name`` to ``target``."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._system.get_file(self._at(name, file), str(target))

    def set_aside(self, newest: int, own: Collection[str]) -> None:
        """Hide checkpoints with a higher step than ``newest``, to which the run was rewound, from resumes.

        Those named in ``own``, which it has written since, stay. What is set aside is left for its owner to remove.
        """
        for name in self._names():
            if name not in own and step_of(Path(name)) > newest and (content := self.manifest_bytes(name)) is not None:
                self._system.pipe_file(self._at(name, _ASIDE), content)
                self._system.rm_file(self._at(name, manifest.NAME))

    def prune(self, keep: int, keep_every_steps: int, torn: Collection[str] = ()) -> None:
        """Remove all but the ``keep`` newest, multiples of ``keep_every_steps`` and what was set aside.

        Those named in ``torn``, torn in the run folder, do not count: what was copied of them is unknown.
        """
        names = self._names()
        cut_off = {name for name in names if not self._system.exists(self._at(name, manifest.NAME))}
        for name in no_longer_kept(names, keep, keep_every_steps, cut_off.union(torn)):
            if not self._system.exists(self._at(name, _ASIDE)):
                self._remove(name)

    def _remove(self, name: str) -> None:
        if self.manifest_bytes(name) is not None:
            self._system.rm_file(self._at(name, manifest.NAME))
        self._system.rm(f"{self._place}/{name}", recursive=True)

    def _names(self) -> list[str]:
        return finished_names(urls.entries(self._system, self._place))

    def _at(self, name: str, file: str) -> str:
        return f"{self._place}/{name}/{file}"


def _own_files(checkpoint: Path) -> tuple[bytes, dict[str, Any]]:
    """The manifest of a checkpoint in the run folder, and its entries of the files, whose sizes are verified."""
    try:
        content = (checkpoint / manifest.NAME).read_bytes()
        files = facts_of(content)["files"]
        wrong = [file for file, entry in files.items() if (checkpoint / file).stat().st_size != entry["bytes"]]
    except (OSError, ValueError) as error:
        raise TornCheckpointError(str(error)) from None
    if wrong:
        raise TornCheckpointError(f"{wrong[0]} does not have the size that the manifest says")
    return content, files


def _groups(files: list[str]) -> Iterator[list[str]]:
    rest = iter(files)
    while some := list(islice(rest, _AT_ONCE)):
        yield some


def facts_of(content: bytes) -> dict[str, Any]:
    """Parse a manifest.

    Raises:
        ValueError: if it is not a manifest of this version.
    """
    try:
        found = json.loads(content)
        if found["format"] == manifest.FORMAT:
            return dict(found)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError("its manifest is not of this version")


def unreachable(url: str, error: Exception) -> str:
    """The error for a mirror that does not answer, or not as it should."""
    return f"train.checkpoint.mirror {url} cannot be used ({urls.reason(error)}); {urls.remedy(error)}, or leave it out"
