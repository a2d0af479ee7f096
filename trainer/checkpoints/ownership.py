"""Which run owns a mirror, and which start of it: the last one to write there.

Each start of a run has an id. The run folder and its mirror both hold the ids of the starts that have used the mirror,
one per line, newest last. If the mirror's newest id is not among the run folder's, another run writes there, or the run
was resumed from the mirror elsewhere. A start that is no longer the newest one leaves the mirror alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from data.files import write_atomically
from trainer.checkpoints.bucket import Bucket
from trainer.checkpoints.layout import STARTS


def starts_of(run: Path) -> list[str]:
    """Ids of the starts of ``run`` that had a mirror."""
    path = run / STARTS
    return path.read_text().split() if path.is_file() else []


def write_starts(run: Path, ids: Sequence[str]) -> None:
    """Write the ``ids`` of all starts to the run folder."""
    write_atomically(run / STARTS, "".join(f"{id_}\n" for id_ in ids).encode())


def of_another_run(bucket: Bucket, run: Path) -> str | None:
    """The error for a bucket that a run other than the one in ``run`` was the last to write to; None if it was not.

    Not meaningful for a run without checkpoints, whose disk may have been lost.
    """
    there = bucket.starts()
    if not there or there[-1] in starts_of(run):
        return None
    return (
        f"train.checkpoint.mirror {bucket.url} belongs to another run, or this run has resumed from it on another "
        f"disk, so the checkpoints in {run} would be mixed with others; give this run a mirror of its own, or an empty "
        "train.run_dir to go on from the mirror"
    )


class Start:
    """One start of a run, on rank 0.

    Args:
        run: the run folder.
        config: the run's, as YAML, to write to the mirror.
        resumed: whether the run folder has a checkpoint of its own.
    """

    def __init__(self, run: Path, config: str, resumed: bool) -> None:
        self._run, self._config, self._resumed = run, config, resumed
        self._id, self._taken = uuid4().hex, False
        write_starts(run, [*starts_of(run), self._id])  # first: however this start ends, the run recognises its mirror

    def take(self, bucket: Bucket) -> str | None:
        """Claim the bucket for this start; return why that is not possible, if it is another run's."""
        if self._resumed and (problem := of_another_run(bucket, self._run)):
            return problem
        bucket.write_config(self._config)
        bucket.write_starts((self._run / STARTS).read_bytes())
        self._taken = True
        return None

    def problem(self, bucket: Bucket) -> str | None:
        """Why this start must leave the bucket alone, if it must; claims it first if that has failed so far."""
        if not self._taken:
            return self.take(bucket)
        if bucket.starts()[-1:] == [self._id]:
            return None
        return f"another start now writes to train.checkpoint.mirror {bucket.url}; give each run a mirror of its own"
