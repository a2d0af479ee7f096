"""A job's resources on the cluster, from the site file or from the command's options.

    partition: gpu                     # ~/.config/hopscotch/slurm.yaml
    account: lm-2026
    gpus_per_node: 8

Defaults < site file < options. The site file is the one that ``--site`` names, else ``~/.config/hopscotch/slurm.yaml``,
else ``launch/slurm/site.yaml``, which lists every field as a comment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from settings import PathText, Strict, load

USER_FILE = "~/.config/hopscotch/slurm.yaml"
SHIPPED_FILE = Path(__file__).with_name("site.yaml")
SIGNAL_EARLY_S = 60
"""SLURM checks time limits once a minute, so the signal may come this many seconds early."""


class SlurmConfig(Strict):
    """One job's resources, and how a node becomes ready to run Python."""

    nodes: int = Field(1, ge=1)
    """Nodes that ranks run on."""
    spare_nodes: int = Field(0, ge=0)
    """Further nodes of the job, idle until one of the others fails: the run then resumes at once, in the same job."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs on each node, one rank each; 0 for a job on CPUs."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks on each node of a job on CPUs; one per GPU otherwise."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of each rank, and its number of threads; 4 for a rank with a GPU and 1 for one without unless given."""
    time: str | None = None
    """Time limit as SLURM writes it, in quotes ("24:00:00", "2-12:00:00", "90" minutes); the partition's unless given.
    A longer run continues in a further job."""
    save_before_s: int = Field(300, ge=1, le=65_535)
    """Seconds before the time limit at which the ranks are asked to save and stop; more than a step, or a
    validation set, and a save take."""
    wait_s: int = Field(960, ge=1)
    """Seconds for which srun waits for the other ranks once one has ended, before it kills them; more than
    ``train.stall_timeout_s``, so that ranks that hang can report where."""
    partition: str | None = None
    """Partition; the cluster's default unless given."""
    account: str | None = None
    """Account that is charged; the user's default unless given."""
    qos: str | None = None
    """Quality of service; the cluster's default unless given."""
    sbatch: list[str] = Field(default_factory=list)
    """Further options of sbatch, as written there: ``--constraint=a100``, ``--exclusive``, ``--mem=0``."""
    srun: list[str] = Field(default_factory=list)
    """Further options of srun, as written there: ``--cpu-bind=cores``, ``--container-image=/images/torch.sqsh``."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules to load, in this order."""
    venv: PathText | None = None
    """Folder of the virtual environment, on the nodes; that of the submitting Python unless given."""
    container: str | None = None
    """Command before ``python3`` on every rank: ``apptainer exec --nv /images/torch.sif``; none unless given."""
    interface: str | None = None
    """Network interface that NCCL and gloo connect over, ``ib0``; they choose one themselves unless given."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(default_factory=dict)
    """Further environment variables of the ranks, values in quotes: ``NCCL_IB_HCA: "mlx5"``."""

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # 90 is minutes to SLURM, and looks like seconds or hours
            raise ValueError(
                'must be in quotes, as in time: "90" for minutes, because YAML reads it as a number otherwise'
            )
        return value

    @model_validator(mode="after")
    def _possible(self) -> SlurmConfig:
        problems = []
        if not self.gpus_per_node and not self.tasks_per_node:
            problems.append(
                "the number of ranks per node is not set; give --gpus-per-node N, or --tasks-per-node N for CPUs"
            )
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            problems.append(
                f"tasks_per_node ({self.tasks_per_node}) must be gpus_per_node ({self.gpus_per_node}), because each "
                "GPU has one rank; leave tasks_per_node out, or set gpus_per_node to 0 for a job on CPUs"
            )
        if self.venv is not None and self.container is not None:
            problems.append(f"venv ({self.venv}) and container ({self.container}) exclude each other; give one of them")
        if waits := [option for option in self.srun if re.match(r"--wait\b|-W", option)]:
            problems.append(
                f"srun {waits[0]} duplicates wait_s; set wait_s in the site file instead, and leave the option out"
            )
        if self.time is not None:
            problems += self._time_problems(self.time)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _time_problems(self, time: str) -> list[str]:
        limit_s = seconds(time)
        if limit_s is None:
            return [f'time must look like "24:00:00", "2-12:00:00" or "90" (minutes), got {time!r}']
        if limit_s <= self.save_before_s + SIGNAL_EARLY_S:
            return [
                f"time ({time}, {limit_s} s) must be more than save_before_s ({self.save_before_s} s) and the "
                f"{SIGNAL_EARLY_S} s by which SLURM may be early, or the run would be stopped at its start; give more "
                "time, or lower save_before_s in the site file"
            ]
        return []

    @property
    def cores_per_rank(self) -> int:
        """Cores of a rank; with a GPU it also reads data, hashes checkpoints and feeds the GPU, a thread for each."""
        return self.cpus_per_task or (4 if self.gpus_per_node else 1)

    @property
    def ranks_per_node(self) -> int:
        """One per GPU, or as many as requested on CPUs."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def runs_here(self) -> bool:
        """Whether a rank has the packages and the trackers' variables of the submitting Python."""
        options = (*self.sbatch, *self.srun, *self.environment)
        differs = any(option.startswith(("--export", "--container", "MLFLOW_", "WANDB_")) for option in options)
        exported = os.environ.get("SBATCH_EXPORT", "ALL").startswith("ALL")
        return exported and not (differs or self.venv or self.container or self.modules)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node


def seconds(time: str) -> int | None:
    """A time limit in SLURM's notation in seconds; None if it is invalid.

    ``90`` is minutes, ``1:30`` minutes and seconds, ``2:00:00`` hours, ``1-0``, ``1-12:30`` and ``1-12:30:00`` days.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None or len(parts) == 3:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    else:
        hours, minutes, secs = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def load_site(path: Path | None, options: Mapping[str, Any]) -> SlurmConfig:
    """The site file with the command's ``options`` over it.

    Args:
        path: the site file; the user's, or the shipped one, if None.
        options: fields and their values; None is not given.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    if path is None:
        path = Path(os.path.expanduser(USER_FILE))  # unchanged if there is no home
        if not path.is_file():
            path = SHIPPED_FILE
    given = {field: value for field, value in options.items() if value is not None}
    overrides = [f"{field}={json.dumps(value, ensure_ascii=False)}" for field, value in given.items()]
    try:
        return load(path, overrides, SlurmConfig)
    except ValueError as error:
        raise ValueError(f"{str(error).removeprefix(f'{path}: ')} (options, and site file {path})") from None
