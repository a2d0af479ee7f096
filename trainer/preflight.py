"""What a command prints and checks before torch and DeepSpeed are imported, which takes seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from data.hub_cache import ensure_hub_cache
from data.questions import find_tasks, read_questions
from data.urls import require_reachable
from settings import looks_first, rank_by_environment
from settings.project import install_command
from trainer.checkpoints.compatibility import refuse_taken
from trainer.checkpoints.layout import checkpoints_of, newest_first, what_is_there
from trainer.config import PretrainConfig
from trainer.config_blocks import TrainConfig
from trainer.monitor.trackers.check import refuse_unusable

WHAT_INIT_TAKES = "give init.path a stage-one run, one of its checkpoints, a folder of weights or a Hugging Face folder"


def open_model(path: Path) -> None:
    """Refuse a path that cannot hold a model, and on a terminal print what is being read.

    Raises:
        ValueError: if ``path`` is not a folder.
    """
    if not path.is_dir():
        what = "give a run, a checkpoint or a folder of weights"
        raise ValueError(f"there is no folder {path}; {what}{what_is_there(path)}")
    if sys.stderr.isatty():
        print(f"{path}: reading; torch takes some seconds to load", file=sys.stderr, flush=True)


def open_run(train: TrainConfig) -> None:
    """On rank 0 print the run folder, refuse one that the run must not start in, and check the files of its tasks.

    After a refusal the launcher ends the other ranks; under ``srun`` all ranks check: see :func:`settings.looks_first`.

    :func:`trainer.checkpoints.resume.find_checkpoint` checks again, with the contents of checkpoints and for all ranks.

    Raises:
        ValueError: if the folder holds another run, or nothing to resume where ``resume`` is ``required``; if a tracker
            cannot be used; if nothing installed supports the mirror's protocol; or if a file of questions is missing or
            invalid.
    """
    if not looks_first():
        return
    if rank_by_environment() == 0:
        print(f"{train.run_dir}: starting; torch and DeepSpeed take some seconds to load", flush=True)
    require_libraries(train)
    refuse_other_run(train, Path(str(train.run_dir)))
    require_questions(train)


def require_libraries(train: TrainConfig) -> None:
    """Check for the libraries that the run's mirror and trackers need.

    Raises:
        ValueError: if a tracker cannot be used, or nothing installed supports the mirror's protocol.
    """
    if train.checkpoint.mirror is not None:
        require_reachable(train.checkpoint.mirror, "train.checkpoint.mirror")
    refuse_unusable(train.log.trackers)


def refuse_other_run(train: TrainConfig, run: Path) -> None:
    """Refuse the folder ``run`` if a run must not start there; its mirror is not contacted.

    Raises:
        ValueError: if it holds another run, or nothing to resume where ``resume`` is ``required``.
    """
    folder = checkpoints_of(run)
    there = [found.name for found in newest_first(folder)]
    if there or train.checkpoint.mirror is None:
        refuse_taken(folder, there, train.checkpoint.resume)


def require_questions(train: TrainConfig) -> None:
    """Read the files of questions among ``train.evaluation.tasks``.

    Raises:
        ValueError: if one is missing or invalid.
    """
    for path in find_tasks(train.evaluation.tasks)[0]:
        read_questions(path)


def require_harness() -> None:
    """Let the Hub's libraries write somewhere, and refuse a machine without lm-evaluation-harness.

    Raises:
        ValueError: if it is not installed.
    """
    ensure_hub_cache()
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError(
            f"lm_eval is not installed; install it with: {install_command('requirements-dev.txt')}"
        ) from None


def require_initial(config: PretrainConfig) -> None:
    """Refuse a run whose ``init.path`` does not exist, unless it resumes from a checkpoint.

    Raises:
        ValueError: if ``init.path`` is not a folder.
    """
    resumes = config.train.checkpoint.mirror is not None or newest_first(checkpoints_of(str(config.train.run_dir)))
    if config.init is not None and not resumes and not Path(config.init.path).is_dir():
        there = what_is_there(Path(config.init.path))
        raise ValueError(f"there is no folder {config.init.path}; {WHAT_INIT_TAKES}{there}")
