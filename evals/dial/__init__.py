"""The compute dial of a checkpoint; here, without torch, where its files are."""

from pathlib import Path

from trainer.checkpoints.layout import run_of

JSON, PICTURE = "dial.json", "dial.png"


def folder_of(run_or_checkpoint: Path) -> Path | None:
    """``RUN/dial``, for a run or one of its checkpoints; None where there is no run."""
    run = run_of(run_or_checkpoint)
    return None if run is None else run / "dial"
