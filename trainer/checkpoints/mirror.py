"""Copying whole checkpoints to a bucket while training continues.

A thread on rank 0 finds which of the run's whole checkpoints should be in the bucket and are not, and copies them,
newest first (``bucket.py``). Every checkpoint that becomes whole wakes it. So what could not be copied before the run
last ended is copied at the next start, and while the bucket fails only the newest is tried: newer ones replace older
ones. Nothing here can fail, stop or slow the run; a failure is reported, retried with exponential backoff, and reported
again at the end. The local checkpoint that is being copied is not removed meanwhile. Torn ones are neither copied nor
counted until the run has written them again: those that the start skipped, and other ones from before it that do not
match their manifest, which is checked before they are copied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data import urls
from settings import to_yaml
from trainer.checkpoints import manifest
from trainer.checkpoints.bucket import Bucket, TornCheckpointError, unreachable
from trainer.checkpoints.layout import names_after, newest_first, step_of
from trainer.checkpoints.ownership import Start
from trainer.config import StageConfig
from trainer.config_blocks import CheckpointConfig
from trainer.distributed import ALONE, World

_LONGEST_PAUSE_S = 60.0
_TOLD_EVERY_S = 600.0
_METRICS_WAIT_S = 10.0
"""How long a run waits at its end for its last metrics to be copied, if all checkpoints are already there."""


class Mirror:
    """The thread, and its state.

    Args:
        folder: the run's ``checkpoints``.
        metrics: the run's file of metrics, copied with each checkpoint.
        config: the ``checkpoint`` block; its ``mirror`` is set.
        tell: called with a sentence for the log, from the thread.
        warn: the same, for failures.
        resumed: the checkpoint in ``folder`` that the run resumes from, if any; known to be whole.
        start: this start; once another start has taken over the bucket, nothing there is touched.
    """

    def __init__(
        self,
        folder: Path,
        metrics: Path,
        config: CheckpointConfig,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
        resumed: Path | None = None,
        start: Start | None = None,
    ) -> None:
        assert config.mirror is not None
        self._start = start
        self._folder, self._config, self._tell, self._warn = folder, config, tell, warn
        self.url, self._metrics = config.mirror, metrics
        self._there: set[str] = set()
        self._whole = set() if resumed is None else {resumed.name}
        self._torn = names_after(resumed)
        self._newest_at_start = next(map(step_of, newest_first(folder)), None)
        self._held: str | None = None
        self._problem: str | None = None
        self._told_at = -_TOLD_EVERY_S
        self._reported_prune = False
        self._changed = threading.Condition()
        self._news, self._idle, self._ending, self._given_up = True, False, False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)  # may hang in a dead network
        self._thread.start()

    @property
    def held(self) -> str | None:
        """Name of the checkpoint that is being copied, which must be kept."""
        return self._held

    def wake(self, name: str) -> None:
        """Notify the thread that the run has written checkpoint ``name``."""
        with self._changed:
            self._whole.add(name)
            self._torn.discard(name)
            self._news, self._idle = True, False
            self._changed.notify_all()

    def close(self, wait_s: float) -> list[str]:
        """Wait until all is copied, ``wait_s`` at most; report and return the names of what is not."""
        with self._changed:
            patience_s = min(wait_s, _METRICS_WAIT_S) if self._idle else wait_s
            self._ending, self._idle = True, False  # the metrics are to be copied once more
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle or self._given_up.is_set(), patience_s)
            self._given_up.set()
            self._changed.notify_all()
        missing = [checkpoint.name for checkpoint in self._wanted() if checkpoint.name not in self._there]
        if missing:
            why = self._problem or f"train.checkpoint.mirror_wait_s ({wait_s:g}) has passed"
            self._warn(
                f"may not be in the mirror {self.url}: {', '.join(missing)} ({why}); they are whole in {self._folder}, "
                "and the next start with this mirror copies those to be kept there"
            )
        return missing

    def _run(self) -> None:
        pause_s, done = urls.FIRST_PAUSE_S, dict[str, set[str]]()
        while not self._given_up.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._news or self._ending)
                self._news = False
            try:
                if self._copy_all(done):
                    pause_s, done = urls.FIRST_PAUSE_S, {}
                    if self._rest():
                        return
            except Exception as error:  # whatever the service's library raises, the run goes on
                self._tell_problem(urls.reason(error))
                pause_s = self._pause(pause_s)

    def _pause(self, pause_s: float) -> float:
        """Wait before the next attempt, less long at the end of the run; return the next pause."""
        with self._changed:
            ending, self._news = self._ending, True
            self._changed.wait_for(lambda: self._given_up.is_set() or self._ending != ending, pause_s)
            return urls.FIRST_PAUSE_S if self._ending != ending else min(2 * pause_s, _LONGEST_PAUSE_S)

    def _rest(self) -> bool:
        """Mark the thread idle if nothing is left to do; return whether it is to end."""
        with self._changed:
            if self._news:
                return False
            self._idle = True
            self._changed.notify_all()
            return self._ending

    def _copy_all(self, done: dict[str, set[str]]) -> bool:
        """Copy what is missing, newest first; False if given up, True also if a new checkpoint comes first."""
        bucket = Bucket(self.url)
        if self._start is not None and (problem := self._start.problem(bucket)):
            self._warn(f"nothing more is mirrored: {problem}")
            self._problem = "another start has taken it over"
            with self._changed:
                self._given_up.set()
                self._changed.notify_all()  # the run's end may wait already
            return False
        with suppress(Exception):  # told by _prune, once something could be copied
            self._set_aside(bucket)
        for checkpoint in self._missing(bucket):
            self._held, start = checkpoint.name, time.monotonic()
            try:
                self._refuse_torn(checkpoint)
                if not bucket.put(checkpoint, done.setdefault(checkpoint.name, set()), self._given_up.is_set):
                    return False
            except TornCheckpointError as torn:
                if checkpoint.exists():  # else it is no longer kept
                    self._torn.add(checkpoint.name)
                    self._news = True  # an older one takes its place
                    self._warn(f"{checkpoint.name} is torn and not mirrored: {torn}")
                continue
            finally:
                self._held = None
            self._there.add(checkpoint.name)
            again = "; it works again" if self._problem else ""
            self._problem, self._told_at = None, -_TOLD_EVERY_S
            self._tell(f"mirrored {checkpoint.name} to {self.url} in {time.monotonic() - start:.1f} s{again}")
            self._prune(bucket)
            bucket.put_beside(self._metrics)
            if self._news:
                return True
        if self._ending:
            with suppress(Exception):  # a line or two
                bucket.put_beside(self._metrics)
        return True

    def _refuse_torn(self, checkpoint: Path) -> None:
        """Compare a checkpoint from before the start with its manifest, once; raises TornCheckpointError."""
        if checkpoint.name not in self._whole:
            if problem := manifest.problem_of(checkpoint, ALONE):
                raise TornCheckpointError(problem)
            self._whole.add(checkpoint.name)

    def _set_aside(self, bucket: Bucket) -> None:
        """Set aside, once, the checkpoints that the run was rewound past, before new ones reach their steps."""
        if self._newest_at_start is not None:
            bucket.set_aside(self._newest_at_start, self._there)
            self._newest_at_start = None

    def _prune(self, bucket: Bucket) -> None:
        """Remove what is no longer kept there; if that is not allowed, as in append-only buckets, report it once."""
        try:
            self._set_aside(bucket)  # else it would count
            bucket.prune(self._config.mirror_keep, self._config.mirror_keep_every_steps, self._torn)
        except Exception as error:  # whatever the service's library raises
            if not self._reported_prune:
                self._warn(f"{self.url}: checkpoints no longer kept there cannot be removed ({urls.reason(error)})")
            self._reported_prune = True

    def _missing(self, bucket: Bucket) -> list[Path]:
        """The wanted checkpoints that the bucket does not have, newest first."""
        missing = []
        for checkpoint in self._wanted():
            if checkpoint.name not in self._there:
                with suppress(TornCheckpointError):
                    if bucket.has(checkpoint):
                        self._there.add(checkpoint.name)
                        continue
                missing.append(checkpoint)
        return missing

    def _wanted(self) -> list[Path]:
        """The local checkpoints that belong in the bucket, newest first."""
        there = (found for found in newest_first(self._folder) if found.name not in self._torn)
        here = [found for found in there if (found / manifest.NAME).is_file()]
        every = self._config.mirror_keep_every_steps
        older = here[self._config.mirror_keep :]
        return here[: self._config.mirror_keep] + [c for c in older if every and step_of(c) % every == 0]

    def _tell_problem(self, problem: str) -> None:
        now = time.monotonic()
        if problem != self._problem or now - self._told_at > _TOLD_EVERY_S:
            self._warn(
                f"checkpoints cannot be mirrored to {self.url} ({problem}); training goes on, they stay in "
                f"{self._folder}, and copying is retried"
            )
            self._told_at = now
        self._problem = problem


def open_mirror(
    folder: Path, metrics: Path, config: StageConfig, world: World, log: logging.Logger, resumed: Path | None
) -> Mirror | None:
    """Start to mirror ``folder``, on rank 0, if the config says so; collective.

    Args:
        folder: the run's ``checkpoints``.
        metrics: the run's file of metrics.
        config: the run's config, which is written there too.
        world: this process among all ranks.
        log: for the thread's messages.
        resumed: the checkpoint that the run resumes from, if any; with one, a bucket that does not answer is retried
            later.

    Raises:
        ValueError: if writing there is not allowed; with ``resumed``, if it is another run's; without, if it does not
            answer.
    """
    url, problem, start = config.train.checkpoint.mirror, None, None
    if url is None:
        return None
    if world.is_main:
        start = Start(metrics.parent, to_yaml(config), resumed is not None)
        try:
            problem = urls.with_retries(lambda: start.take(Bucket(url)))
        except Exception as error:  # each service has classes of its own
            problem = unreachable(url, error)
            if resumed is not None and not urls.is_refusal(error):
                log.warning(
                    f"{problem}; the run goes on from {resumed}, and mirroring is retried with every checkpoint"
                )
                problem = None
    problem = world.broadcast_object(problem)
    if problem:
        raise ValueError(problem)
    if not world.is_main:
        return None
    return Mirror(folder, metrics, config.train.checkpoint, log.info, log.warning, resumed, start)
