"""What is submitted: a run of either stage, or an array of them, read and checked as its training command will do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.configs import load_either
from launch.slurm.config import SlurmConfig
from trainer.checkpoints.compatibility import refuse_taken
from trainer.config import PretrainConfig, is_stage_two
from trainer.preflight import refuse_other_run, require_initial, require_libraries, require_questions
from tune.config import TuneFile
from tune.examples import all_files
from tune.preflight import require_apart, require_base
from tune.resolve import load_file


@dataclass(frozen=True)
class Array:
    """A job array: one run for every value of a field.

    Attributes:
        key: the field, ``train.seed``.
        values: one per task, as on the command line.
    """

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class StageJob:
    """Stage one or two, once or as an array.

    Attributes:
        file: the config as written.
        overrides: ``key.sub=value``, the same for every task, without what the job sets itself.
        run: the run's folder, without its task's number.
        tasks: suffixes of ``run`` in the folders' names: empty for a single run; -0, -1 ... in an array.
        varied: the field that differs between tasks; None for a single run, and for stages after an array.
        base: ``run`` of the stage before it in the chain; None for a chain's first.
        configs: resolved, one per task.
    """

    file: Path
    overrides: tuple[str, ...]
    run: str
    tasks: tuple[str, ...]
    varied: Array | None
    base: str | None
    configs: tuple[PretrainConfig | TuneFile, ...]

    field = "train.run_dir"
    """The config field that gives ``run``."""

    @property
    def module(self) -> str:
        """The module that trains it."""
        return "tune.train" if isinstance(self.configs[0], TuneFile) else "pretrain.train"

    @property
    def folders(self) -> list[Path]:
        """The run's folder, or every task's."""
        return [Path(f"{self.run}{task}") for task in self.tasks]


def parse_array(text: str) -> Array:
    """``train.seed=0,1,2``.

    Raises:
        ValueError: if it names no field, or fewer than two different values.
    """
    key, equals, values = text.partition("=")
    parts = tuple(value.strip() for value in values.split(","))
    if not equals or not key or not all(parts) or len(set(parts)) < max(len(parts), 2):
        raise ValueError(f"--array '{text}' must be a field and two or more different values: train.seed=0,1,2")
    if key in ("train.run_dir", "train.checkpoint.resume", "base.path"):
        raise ValueError(f"--array {key} would be overridden: every job sets {key} itself; vary another field")
    return Array(key, parts)


def load_stage(
    file: Path, overrides: Sequence[str], site: SlurmConfig, array: Array | None = None, prepared: bool = True
) -> StageJob:
    """The first stage of a chain, or the only one.

    Args:
        file: a config of either stage; one with a ``base`` block is of stage two.
        overrides: ``key.sub=value``.
        site: the resources; the global batch must be divisible over their ranks.
        array: its tasks; a single run if None.
        prepared: all its inputs exist already.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    run = str(Path(str(load_either(file, overrides).train.run_dir)))  # without a trailing slash
    tasks: list[tuple[str, list[str]]] = [("", [])]
    if array is not None:
        tasks = [(f"-{number}", [f"{array.key}={value}"]) for number, value in enumerate(array.values)]
    configs = tuple(load_either(file, [*overrides, *value, f"train.run_dir={run}{task}"]) for task, value in tasks)
    names = tuple(task for task, _ in tasks)
    return _checked(StageJob(file, _passed_on(overrides), run, names, array, None, configs), site, prepared)


def load_next(
    file: Path, overrides: Sequence[str], site: SlurmConfig, before: StageJob, prepared: bool = True
) -> StageJob:
    """A stage-two run of what the stage ``before`` trains, or one for each of its tasks.

    ``prepared`` as in :func:`load_stage`.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    if not is_stage_two(file):
        raise ValueError(f"--then {file} is not a config of stage two: it has no base block; submit it separately")
    given = next((text for text in overrides if text.startswith("base.path=")), None)
    if given is not None:
        raise ValueError(
            f"--then tunes {before.run}, the run before it; leave {given} out, or submit {file} separately"
        )
    run = str(Path(str(load_file(file, overrides).train.run_dir)))
    configs = tuple(
        load_file(file, [*overrides, f"base.path={before.run}{task}", f"train.run_dir={run}{task}"])
        for task in before.tasks
    )
    return _checked(StageJob(file, _passed_on(overrides), run, before.tasks, None, before.run, configs), site, prepared)


def require_plain(field: str, folder: str) -> None:
    """Raise ValueError if ``folder``, which ``field`` names, cannot be used in a batch script's options."""
    if re.search(r"[^\w./+=:@-]", folder):
        raise ValueError(
            f"{field} '{folder}' is used in SLURM's options, where some characters have a special meaning; use letters "
            "and digits and . _ - / + = @"
        )
    if ":" in (place := str(Path(folder).resolve())):
        raise ValueError(
            f"{field} {place} contains ':', the separator of PYTHONPATH, through which a job finds its copy of the "
            "code there; give a folder without it"
        )


def _checked(stage: StageJob, site: SlurmConfig, prepared: bool = True) -> StageJob:
    """``stage``, if it could start.

    Raises:
        ValueError: if the run would refuse to start, as far as can be told here (its inputs are checked only if
            ``prepared``), or ranks that hang would be killed before they could report it.
    """
    require_plain("train.run_dir", stage.run)
    for config in stage.configs:
        config.train.refuse_to_start()
        config.train.accumulation(site.world_size, config.deepspeed)
        if config.train.stall_timeout_s >= site.wait_s:
            raise ValueError(
                f"train.stall_timeout_s ({config.train.stall_timeout_s:g}) must be below wait_s ({site.wait_s}) of the "
                "site file, after which srun kills hanging ranks, before they could report where they hang; lower the "
                "one or raise the other"
            )
        if site.runs_here:
            require_libraries(config.train)
        if isinstance(config, TuneFile):
            require_apart(Path(str(config.train.run_dir)), Path(config.base.path))
        if prepared:
            _require_inputs(config, stage.base is None)
    return stage


def _require_inputs(config: PretrainConfig | TuneFile, based: bool) -> None:
    """Raise ValueError unless all inputs of a start exist; its base is checked only if ``based``."""
    require_questions(config.train)
    if isinstance(config, PretrainConfig):
        from data.batches import open_all

        require_initial(config)
        open_all(config.data)
        return
    if based:
        require_base(Path(config.base.path))
    all_files(config.data)


def refuse_held(stage: StageJob) -> None:
    """Raise ValueError if a run folder of ``stage`` holds another run, or nothing to resume from though it must resume.

    Also if its mirror holds checkpoints and ``resume`` is never: the job's starts would resume from them.
    """
    for config, folder in zip(stage.configs, stage.folders, strict=True):
        refuse_other_run(config.train, folder)
        mirror, resume = config.train.checkpoint.mirror, config.train.checkpoint.resume
        if mirror is not None and resume == "never":
            from trainer.checkpoints.fetch import mirrored_names
            from trainer.distributed import ALONE

            refuse_taken(mirror, mirrored_names(mirror, ALONE), resume, "train.checkpoint.mirror")


def _passed_on(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides that the job does not set itself: not its run folder, nor what a start resumes from."""
    return tuple(text for text in overrides if not text.startswith(("train.run_dir=", "train.checkpoint.resume=")))
