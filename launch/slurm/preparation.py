"""A job array that prepares a config's data, submitted for ``--prepare --tasks N``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig, load_data
from data.prepare.run import parts_of, tokenizer_of
from launch.slurm.jobs import require_plain
from settings import Strict


class DataFile(Strict):
    """The part of a config that a preparation reads."""

    data: DataConfig


@dataclass(frozen=True)
class PrepareJob:
    """One array whose tasks each prepare a share of the parts; see StageJob for the common attributes.

    Attributes:
        file: the config as written.
        overrides: ``key.sub=value``.
        run: ``data.dir``, where logs and submitted files go.
        configs: the resolved one.
        shares: tasks of the array.
    """

    file: Path
    overrides: tuple[str, ...]
    run: str
    configs: tuple[DataFile]
    shares: int

    field = "data.dir"
    module = "data.prepare"
    tasks = ("",)

    @property
    def folders(self) -> list[Path]:
        """The folder of the data."""
        return [Path(self.run)]


def load_preparation(file: Path, overrides: Sequence[str], shares: int) -> PrepareJob:
    """The array of ``shares`` tasks that prepares the ``data`` block of ``file``.

    Raises:
        ValueError: with one sentence for each mistake; also if there are fewer parts than tasks.
    """
    config = load_data(file, overrides)
    require_plain("data.dir", config.dir)
    parts = [part for parts in parts_of(config, tokenizer_of(config)) for part in parts]
    if not 1 <= shares <= len(parts):
        raise ValueError(
            f"--tasks {shares} must be from 1 to the number of parts, {len(parts):,}, because a task prepares at least "
            f"one part; lower data.part_bytes ({config.part_bytes:,}) for more parts"
        )
    return PrepareJob(file, tuple(overrides), config.dir, (DataFile(data=config),), shares)
