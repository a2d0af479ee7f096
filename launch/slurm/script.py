"""The scripts that SLURM gets: ``stage.sbatch``, ``export.sbatch`` and ``prepare.sbatch`` of this folder, rendered."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.slurm.config import SlurmConfig
from launch.slurm.jobs import StageJob
from launch.slurm.preparation import PrepareJob

STARTS_WITHOUT_PROGRESS = 3
"""This many starts of one job may resume from the same checkpoint; the next one ends with an error."""


def stage_script(stage: StageJob, site: SlurmConfig, submission: str, job_name: str | None) -> str:
    """The batch script of ``stage``.

    Args:
        site: resources and how a node becomes ready.
        submission: name of the folder in ``RUN/submit`` with the code and config of this submission.
        job_name: the run folder's name if None.
    """
    resume = stage.configs[0].train.checkpoint.resume
    own = {
        "module": stage.module,
        "overrides": stage.overrides,
        "varied": stage.varied,
        "base": stage.base,
        # Every start after the first resumes; that there was nothing before it is checked at submission.
        "resume": "auto" if resume == "never" else resume,
        "starts": STARTS_WITHOUT_PROGRESS,
    }
    return _render("stage.sbatch", stage, site, submission, job_name or Path(stage.run).name, own)


def export_script(stage: StageJob, out: str, site: SlurmConfig, submission: str, job_name: str | None) -> str:
    """The batch script that exports what ``stage`` trained to ``out``, or to ``out-i`` for every task i."""
    name = f"{job_name or Path(stage.run).name}-export"
    return _render("export.sbatch", stage, site, submission, name, {"out": out})


def prepare_script(job: PrepareJob, site: SlurmConfig, submission: str, job_name: str | None) -> str:
    """The batch script of the array that prepares data."""
    own = {"overrides": job.overrides, "shares": job.shares}
    return _render("prepare.sbatch", job, site, submission, job_name or f"{Path(job.run).name}-prepare", own)


def _render(
    template: str, stage: StageJob | PrepareJob, site: SlurmConfig, submission: str, job_name: str, own: dict[str, Any]
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    environment.filters["directive"] = _directive
    environment.filters["one_line"] = _one_line
    return environment.get_template(template).render(
        site=site,
        root=Path.cwd(),
        run=stage.run,
        array=0 if stage.tasks == ("",) else len(stage.tasks),
        submission=submission,
        script=stage.folders[0] / "submit" / submission / ("job.sbatch" if template == "stage.sbatch" else template),
        job_name=job_name,
        python=_python(site),
        srun_options="".join(f"{option} " for option in site.srun),
        **own,
    )


def _directive(value: object) -> str:
    """An option's value in an #SBATCH line, where SLURM understands quotes and no shell is involved.

    Raises:
        ValueError: if it cannot be written there safely.
    """
    text = _one_line(value)
    if bad := re.search(r"[\"\\\\]", text):
        raise ValueError(
            f"{text!r} holds {bad[0]}, which SLURM cannot read in a batch script's options; leave out quotes and "
            "backslashes"
        )
    return text if re.fullmatch(r"[\w./:=@%+,-]+", text) else f'"{text}"'


def _one_line(value: object) -> str:
    text = str(value)
    if not text.isprintable():
        raise ValueError(
            f"{text!r} holds a line break or another control character, which would end the line of the batch script "
            "that it stands in; leave it out"
        )
    return text


def _python(site: SlurmConfig) -> str:
    """The command that starts Python on a rank."""
    if site.container is not None:
        return f"{site.container} python3"
    return shlex.quote(sys.executable if site.venv is None else f"{site.venv}/bin/python")
