"""A run is a folder; this is its layout.

runs/NAME/
  config.yaml             as resolved: can be run again as it is
  config.original.yaml    as written, with its comments
  tokenizer/              a copy of the tokenizer's files: see trainer/checkpoints/run_tokenizer.py
  code.commit, code.diff  commit of the code, and uncommitted changes to tracked files, if any, at the last start
  metrics.jsonl           one line per logged step
  tensorboard/            the same, for TensorBoard
  starts.txt              if there is a mirror, ids of the starts: see trainer/checkpoints/ownership.py
  trackers.json           this run's ids in other trackers: see trainer/monitor/trackers/; wandb/ is wandb's
  routing.png             densities so far, and which layers the tokens of one text executed
  heartbeat/rank-N.json   step and phase of every rank: see trainer/heartbeat.py
  logs/rank-N.log         the log of every rank
  profile/                traces of profiled steps: see trainer/monitor/profiler.py
  flight/                 NCCL's last collectives, after a stall: see trainer/flight_recorder.py
  checkpoints/            see trainer/checkpoints/layout.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data.files import only_writer, write_atomically
from settings import to_yaml
from trainer import git_state
from trainer.checkpoints.layout import CONFIG, checkpoints_of
from trainer.checkpoints.retention import unwritable
from trainer.checkpoints.run_tokenizer import keep_tokenizer
from trainer.config import StageConfig
from trainer.heartbeat import Heartbeat
from trainer.monitor import metrics_file

ORIGINAL = "config.original.yaml"
"""The config as the user wrote it."""
_LET_GO_S = 15.0
"""How long rank 0 of an earlier start, killed a moment ago, may hold the folder: its memory is given back first."""


class RunFolder:
    """Paths of one run, created by rank 0."""

    def __init__(self, path: str | Path, rank: int):
        self.path = Path(path)
        self.rank = rank
        self._is_locked = False
        self.metrics = self.path / metrics_file.NAME
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = checkpoints_of(self.path)
        self.heartbeat = Heartbeat(self.path / "heartbeat", rank)
        self.log = self.path / "logs" / f"rank-{rank}.log"

    def lock(self, hold: ExitStack) -> str | None:
        """Lock an existing folder against other commands until ``hold`` is closed; return why it cannot, if so.

        Called before a checkpoint is chosen, so that launch.rewind does not move it away while it is read, and before
        anything is loaded, because a run that is still active here may leave no memory for it.
        """
        if not self.path.is_dir():
            return None
        try:
            hold.enter_context(only_writer(self.path, wait_s=_LET_GO_S))
        except ValueError as error:
            return str(error)
        self._is_locked = True
        return None

    def claim(self, config: StageConfig, original: str | Path, hold: ExitStack) -> str | None:
        """Create the run folder, locked as by :meth:`lock`; return why that is not possible, if so."""
        try:
            with self.writing():
                self.path.mkdir(parents=True, exist_ok=True)
                if not self._is_locked and (problem := self.lock(hold)):
                    return problem
                self.create(config, original)
        except ValueError as error:
            return str(error)
        return None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Name the folder in a disk error; Python omits it when the disk is full.

        Raises:
            ValueError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:
            raise ValueError(unwritable(self.path, error)) from error

    def create(self, config: StageConfig, original: str | Path) -> None:
        """Create the folders; write the configs, the tokenizer and the state of the code (rank 0 only)."""
        beats = self.heartbeat.path.parent
        for folder in (self.checkpoints, self.tensorboard, beats, self.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        for old in beats.iterdir():
            old.unlink()  # of an earlier start, which may have had more ranks
        keep_tokenizer(config.tokenizer_folder, self.path)
        copy = self.path / ORIGINAL
        if not (copy.exists() and self._is_own(Path(original))):
            write_atomically(copy, Path(original).read_bytes())  # before config.yaml, which may be what was written
        write_atomically(self.path / CONFIG, to_yaml(config).encode())
        for name, content in (("code.commit", git_state.commit()), ("code.diff", git_state.diff())):
            (self.path / name).unlink(missing_ok=True)  # of an earlier start
            if content:
                write_atomically(self.path / name, content.encode())

    def _is_own(self, config: Path) -> bool:
        """Whether this run wrote ``config``, here or into a checkpoint, and is resumed from it."""
        return config.name in (CONFIG, ORIGINAL) and config.resolve().is_relative_to(self.path.resolve())

    @property
    def description(self) -> list[Path]:
        """The files that describe the run; some may be missing."""
        return [self.path / name for name in (CONFIG, ORIGINAL, "code.commit", "code.diff")]

    @property
    def record(self) -> list[Path]:
        """The files that record how it went."""
        return [self.metrics, self.log]

    def beat(self, step: int, phase: str) -> None:
        """Record progress: what this rank does now, and at which step."""
        self.heartbeat.note(step, phase)
