"""Writing a checkpoint while training continues.

    copy     every rank copies its state to host memory; training waits only for this
    write    a thread of each rank writes its own files, syncs and hashes them, and leaves a receipt (``receipts.py``)
    finish   rank 0's thread, once all receipts are there, writes the manifest and renames the folder

DeepSpeed writes in place and names a checkpoint ``latest`` before every rank has finished, so a kill leaves a torn
checkpoint that looks whole. Here everything goes to ``step-N.partial`` (``layout.py``), and the manifest is written
last.

A save begins only after the one before has ended, so at most one copy of a rank's state is held. The threads use no
collectives, which would interfere with those of the training step: they communicate by files. A thread that fails makes
its rank ask to stop; at the next step all ranks end together, with its reason.
"""

from __future__ import annotations

import copy
import re
import shutil
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import sync
from settings import to_yaml
from trainer import git_state
from trainer.checkpoints import manifest, receipts
from trainer.checkpoints.compatibility import conditions
from trainer.checkpoints.layout import (
    CONFIG,
    ENGINE,
    STATE,
    checkpoint_at,
    leftovers,
    names_after,
    newest_name,
    partial_of,
    rng_name,
)
from trainer.checkpoints.mirror import Mirror
from trainer.checkpoints.retention import check_room, checkpoint_bytes, prune, remove
from trainer.checkpoints.rng import rng_state
from trainer.config import StageConfig
from trainer.deepspeed_internals import uses_cuda, writing_through
from trainer.distributed import World
from trainer.log import logger_of_run

_POLL_S, _SLOWEST_POLL_S = 0.05, 1.0
_QUIET_S = 60.0
"""How long a checkpoint may go without growing before a waiting rank no longer reports progress."""
_FIRST_ERROR_S = 5.0
"""The same after an error has ended this rank, and probably others."""


class Saver:
    """Writes a run's checkpoints, one after the other.

    Args:
        folder: the run's ``checkpoints``.
        fingerprint: of the data and its order.
        config: the run's config.
        world: this process among all ranks; :meth:`save` and :meth:`wait` are collective.
        tell: called with a sentence for each whole checkpoint, on rank 0, from the thread.
        tick: called while a rank waits and the checkpoint grows, so that a long save is not taken for a hang.
        origin: what the run started from, in words; None for randomly initialised weights.
        mirror: on rank 0, the thread that copies whole checkpoints elsewhere, if any.
        resumed: the checkpoint in ``folder`` that the run resumes from, if any.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        config: StageConfig,
        world: World,
        tell: Callable[[str], None] = print,
        tick: Callable[[], None] = lambda: None,
        origin: str | None = None,
        mirror: Mirror | None = None,
        resumed: Path | None = None,
    ):
        self.folder, self.fingerprint, self.config, self.world = folder, fingerprint, config, world
        self.origin, self.mirror = origin, mirror
        self.tell, self.tick = tell, tick
        self._torn = names_after(resumed)
        self._thread: threading.Thread | None = None
        self._reset()

    @property
    def failed(self) -> bool:
        """True once this rank knows that a checkpoint will not become whole; :meth:`wait` says why."""
        return self._problem is not None

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> Path:
        """Copy everything, start writing it, and return the checkpoint's final folder.

        Args:
            engine: the DeepSpeed engine, at an accumulation boundary.
            step: optimiser steps done.
            state: the trainer's state to restore, the same on every rank; tensors, numbers, strings, lists and dicts.

        Raises:
            ValueError: if the save before failed, or there is no room or folder for this one; older ones are untouched.
        """
        self.wait()
        start = time.perf_counter()
        final = checkpoint_at(self.folder, step)
        partial = partial_of(final)
        self._make_room(engine, partial)
        files = _captured(engine, partial)
        files[partial / rng_name(self.world.rank)] = rng_state()
        if self.world.is_main:
            files[partial / STATE] = _on_host(state, {})
            files[partial / CONFIG] = to_yaml(self.config)
        if uses_cuda():
            torch.cuda.synchronize()  # the copies to pinned memory are under way
        facts = {
            "step": step,
            **conditions(self.config, self.world),
            "data_fingerprint": self.fingerprint,
            "init": self.origin,
            "commit": git_state.commit() if self.world.is_main else None,
        }
        self._final, self._partial = final, partial
        self._thread = threading.Thread(target=self._run, args=(files, partial, facts, start), name=f"save {step}")
        self._waited_s = time.perf_counter() - start
        self._thread.start()
        return final

    def wait(self) -> None:
        """Return when the checkpoint under way, if any, is whole.

        Raises:
            ValueError: if it could not be written, on every rank.
        """
        if self._thread is None:
            return
        self._watch(_QUIET_S)
        self._written.wait()
        problem = next((p for p in self.world.all_gather_objects(self._problem) if p), None)
        if problem:
            self._given_up.set()
        self._thread.join()
        problem = problem or self.world.broadcast_object(self._problem)
        name = self._final.name
        self._reset()
        if problem:
            raise ValueError(
                f"checkpoint {name} could not be written to {self.folder} {problem}: {newest_name(self.folder)}"
            )

    def end(self) -> None:
        """After an error: finish what this rank has begun to write, without waiting for ranks that have stopped."""
        if self._thread is not None:
            self._watch(_FIRST_ERROR_S)
            self._given_up.set()
            self._thread.join()

    def _watch(self, quiet_s: float) -> None:
        """Tick as long as rank 0 sees the checkpoint grow; return once it is over, or has not grown for ``quiet_s``."""
        before, since, pause_s = 0, time.monotonic(), _POLL_S
        while not (self._written.is_set() and self.failed):
            grown = receipts.last_growth(self._partial)
            if grown is None:
                return
            if grown != before:
                before, since = grown, time.monotonic()
                self.tick()
            if self._written.is_set() and time.monotonic() - since > quiet_s:
                return
            self._given_up.wait(pause_s)
            pause_s = min(2 * pause_s, _SLOWEST_POLL_S)

    def _reset(self) -> None:
        self._problem: str | None = None
        self._thread, self._waited_s, self._final, self._partial = None, 0.0, self.folder, self.folder
        self._written, self._given_up = threading.Event(), threading.Event()

    def _make_room(self, engine: Any, partial: Path) -> None:
        """Create an empty folder that all ranks see, on a disk with room for the checkpoint."""
        problem, shows = None, None
        if self.world.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in leftovers(self.folder):
                    # Before the check: what a full disk left behind takes room, too.
                    shutil.rmtree(stale, ignore_errors=stale != partial)
                size = checkpoint_bytes(engine.module, self.config)
                check_room(size, self.folder, partial.stem, self.config.train.checkpoint.max_gb)
                shows = receipts.begin(partial)
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                problem = (
                    f"{partial} cannot be made ({error.strerror}); make {self.folder} writable, and resume: "
                    f"{newest_name(self.folder)}"
                )
        problem, shows = self.world.broadcast_object((problem, shows))
        if problem is None:
            unseen = [r for r, seen in enumerate(self.world.all_gather_objects(receipts.appears(shows))) if not seen]
            if unseen:
                problem = (
                    f"rank {unseen[0]} does not see {partial}, which rank 0 has created; put train.run_dir on a disk "
                    "that all machines share"
                )
        if problem:
            raise ValueError(problem)

    def _run(self, files: dict[Path, Any], partial: Path, facts: dict[str, Any], start: float) -> None:
        """The thread: whatever it raises is recorded, and no rank is left waiting for it."""
        try:
            receipt = {}
            while files:  # each file's copy is let go once it is on the disk
                path, content = files.popitem()
                _write(path, content)
                del content
                receipt[str(path.relative_to(partial))] = manifest.entry_of(path)
            receipts.leave(partial, self.world.rank, receipt)
        except Exception as error:
            self._problem = _reason(error)
            receipts.leave_failure(partial, self.world.rank)
        finally:
            files.clear()
            self._written.set()
        if not self.world.is_main:
            return
        try:
            if not self._problem and self._finish(partial, facts):
                took_s = time.perf_counter() - start
                self.tell(f"saved {self._final} in {took_s:.1f} s, of which training waited {self._waited_s:.1f} s")
        except Exception as error:
            self._problem = _reason(error)
        finally:
            receipts.end(partial)

    def _finish(self, partial: Path, facts: dict[str, Any]) -> bool:
        """On rank 0, once all have written: write the manifest, rename, prune; False if given up."""
        collected, patience_s = receipts.Collection(partial, self.world.size), self.config.train.timeout_s
        start, pause_s = time.monotonic(), _POLL_S
        while not (whole := collected.look()):
            if whole is False or self._given_up.wait(pause_s):
                return False
            if time.monotonic() - start > patience_s:
                raise OSError(f"not every rank had written its part after {patience_s:.0f} s")
            pause_s = min(2 * pause_s, _SLOWEST_POLL_S)
        receipts.remove(partial)
        manifest.write(partial, facts, collected.files)
        if self._final.exists():  # a torn one, or a run that was rewound and came here again
            remove(self._final)
        partial.rename(self._final)
        sync(self.folder)
        self._torn.discard(self._final.name)
        held = None if self.mirror is None else self.mirror.held
        prune(self.folder, self._final, self.config.train.checkpoint, held, self._torn)
        if self.mirror is not None:
            self.mirror.wake(self._final.name)
        return True


def _captured(engine: Any, partial: Path) -> dict[Path, Any]:
    """What DeepSpeed would write, by path, as copies on the host."""
    taken: dict[Path, Any] = {}

    def take(state: Any, path: str) -> None:
        taken[Path(path)] = _on_host(state, {})

    with writing_through(engine, take):
        engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False)
    return taken


def _on_host(value: Any, seen: dict[tuple[Any, ...], Tensor]) -> Any:
    """A copy in host memory that shares nothing with ``value``; aliased tensors stay aliased."""
    if isinstance(value, Tensor):
        place = (value.data_ptr(), value.storage_offset(), value.dtype, value.shape, value.stride())
        if place not in seen:
            target = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            seen[place] = target.copy_(value.detach(), non_blocking=True)
        return seen[place]
    if isinstance(value, dict):
        return type(value)((key, _on_host(inner, seen)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(_on_host(inner, seen) for inner in value)
    if isinstance(value, Enum):  # Python 3.11.2 pickles its members by a call to getattr, which loading refuses
        return value.value
    return copy.deepcopy(value)


def _write(path: Path, content: Any) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        torch.save(content, path)
    sync(path)


def _reason(error: Exception) -> str:
    """What went wrong, and what to do."""
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    # What torch's file writer says of a full disk; anything else is no matter of the disk.
    if isinstance(error, OSError) or re.search("write|iostream|inline_container", what):
        return f"({what}); make room there and resume"
    logger_of_run().error("saving failed", exc_info=error)
    return f"({type(error).__name__}: {what}), a bug in Hopscotch; report it with logs/rank-N.log, and resume"
