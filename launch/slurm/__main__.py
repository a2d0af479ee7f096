"""Submit a run to SLURM, or a chain of runs: it trains through time limits and node failures until all steps are done.

    python -m launch.slurm configs/skip_1b.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
    python -m launch.slurm my.yaml train.steps=2000 --nodes 2 --gpus-per-node 8 --dry-run
    python -m launch.slurm my.yaml --gpus-per-node 8 --then my_task.yaml train.steps=500 --export exports/my
    python -m launch.slurm my.yaml --gpus-per-node 8 --array train.seed=0,1,2
    python -m launch.slurm my.yaml --prepare --tasks 16 --cpus-per-task 32 --partition cpu
    python -m launch.slurm my.yaml --gpus-per-node 8 --after 4711

CONFIG is of either stage. With --then, stage two tunes what the run before it trained (base.path is set) and starts
when that has succeeded. With --array every value has its own run folder, RUN-0, RUN-1 and so on, and later stages run
for each of them. With --prepare an array of --tasks jobs shares the preparation of CONFIG's data; with --after a run
starts when that job, or any other, has succeeded. Settings for all jobs of a cluster are in
~/.config/hopscotch/slurm.yaml; see docs/clusters.md.

Exit status: 0 when everything is submitted; 1 when nothing is, with a sentence that says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.config import SlurmConfig, load_site
from launch.slurm.jobs import StageJob, load_next, load_stage, parse_array, refuse_held
from launch.slurm.preparation import PrepareJob, load_preparation
from launch.slurm.script import export_script, prepare_script, stage_script
from launch.slurm.submit import BatchJob, submit
from settings import command_parser, counted, parse_arguments, path_argument, to_yaml, user_errors

SITE_OPTIONS = (
    "nodes",
    "spare_nodes",
    "gpus_per_node",
    "tasks_per_node",
    "cpus_per_task",
    "time",
    "partition",
    "account",
    "qos",
    "venv",
    "container",
)

Stage = StageJob | PrepareJob


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, check, and submit or print."""
    options = parse_arguments(_parser(), arguments)
    with user_errors():
        given = {name: getattr(options, name) for name in SITE_OPTIONS}
        modules = None if options.modules is None else options.modules.split(",")
        if options.prepare:
            _refuse_of_a_run(options)
            given |= {"nodes": 1, "spare_nodes": 0, "gpus_per_node": 0, "tasks_per_node": 1}
        elif options.tasks is not None:
            raise ValueError(f"--tasks {options.tasks} divides a preparation; give --prepare, or leave it out")
        site = load_site(options.site, given | {"modules": modules})
        site = site.model_copy(update={"sbatch": [*site.sbatch, *options.sbatch]})
        stages = _preparation(options) if options.prepare else _stages(options, site)
        if options.print_config:
            print("---\n".join(to_yaml(config) for stage in stages for config in stage.configs), end="")
            return 0
        submission = time.strftime("%Y-%m-%dT%H-%M-%S")
        jobs = _jobs(options, stages, site, submission)
        if options.dry_run:
            print("\n".join(job.script for job in jobs), end="")
            _note_held(stages)
            return 0
        _refuse_held(stages)
        ids = submit(jobs, submission, options.after)
        print(_describe(jobs, ids, site))
    return 0


def _refuse_of_a_run(options: argparse.Namespace) -> None:
    """Refuse options of runs: a preparation has no ranks and no chain."""
    given = {
        "--nodes": options.nodes, "--spare-nodes": options.spare_nodes, "--gpus-per-node": options.gpus_per_node,
        "--tasks-per-node": options.tasks_per_node,
        "--array": options.array, "--then": options.then, "--export": options.export,
    }  # fmt: skip
    if wrong := [name for name, value in given.items() if value not in (None, [])]:
        raise ValueError(
            f"{', '.join(wrong)} applies to a run, but --prepare submits none; submit the run separately, with --after "
            "and the preparation's job id"
        )
    if options.tasks is None:
        raise ValueError("--prepare needs --tasks N, the number of jobs that share the preparation")


def _preparation(options: argparse.Namespace) -> list[PrepareJob]:
    return [load_preparation(options.config, options.overrides, options.tasks)]


def _stages(options: argparse.Namespace, site: SlurmConfig) -> list[StageJob]:
    array = None if options.array is None else parse_array(options.array)
    prepared = options.after is None  # otherwise that job may still have to prepare the data
    stages = [load_stage(options.config, options.overrides, site, array, prepared)]
    for file, *overrides in options.then:
        stages.append(load_next(Path(file), overrides, site, stages[-1], prepared))
    folders = [folder.resolve() for stage in stages for folder in stage.folders]
    twice = {str(folder) for folder in folders if folders.count(folder) > 1}
    if twice:
        raise ValueError(f"two runs of the chain use the folder {', '.join(twice)}; give each its train.run_dir")
    return stages


def _refuse_held(stages: Sequence[Stage]) -> None:
    for stage in stages:
        if isinstance(stage, StageJob):  # a preparation continues with the parts that are there
            refuse_held(stage)


def _note_held(stages: Sequence[Stage]) -> None:
    """A dry run submits nothing, so what submission would refuse is only reported."""
    try:
        _refuse_held(stages)
    except ValueError as error:
        print(f"note: this would not be submitted: {error}", file=sys.stderr)


def _jobs(options: argparse.Namespace, stages: Sequence[Stage], site: SlurmConfig, submission: str) -> list[BatchJob]:
    jobs = []
    for stage in stages:
        if isinstance(stage, PrepareJob):
            script = prepare_script(stage, site, submission, options.job_name)
            jobs.append(BatchJob(stage.module, "prepare.sbatch", script, stage))
        else:
            script = stage_script(stage, site, submission, options.job_name)
            jobs.append(BatchJob(stage.module, "job.sbatch", script, stage))
    last = stages[-1]
    if options.export is not None and isinstance(last, StageJob):
        export = str(Path(options.export))  # without a trailing slash
        for out in (Path(f"{export}{task}") for task in last.tasks):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise ValueError(
                    f"--export {out} already exists and is not an empty folder; nothing is overwritten, so give "
                    "another one"
                )
        script = export_script(last, export, site, submission, options.job_name)
        jobs.append(BatchJob("convert.to_hf", "export.sbatch", script, last))
    return jobs


def _describe(jobs: list[BatchJob], ids: list[str], site: SlurmConfig) -> str:
    """What was submitted, and how to look at it and stop it."""
    first = jobs[0].stage
    if isinstance(first, PrepareJob):
        lines = [f"preparing in {counted(first.shares, 'task')} of {counted(site.cores_per_rank, 'core')}"]
    else:
        spare = f", {site.spare_nodes} more to spare" if site.spare_nodes else ""
        lines = [f"training on {counted(site.nodes, 'node')} of {counted(site.ranks_per_node, 'rank')}{spare}"]
    for number, (job, id_) in enumerate(zip(jobs, ids, strict=True)):
        tasks = job.stage.tasks
        folder = f"{job.stage.run}{tasks[0]}" + (f" to {tasks[-1]}" if len(tasks) > 1 else "")
        lines.append(f"job {id_}  {job.what}  {folder}" + (f"  after {ids[number - 1]}" if number else ""))
    logs = first.folders[0] / "logs"
    return "\n".join(
        [*lines, f"follow    squeue --me; tail -F {logs}/slurm-*.out", f"stop      scancel {' '.join(ids)}"]
    )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("launch.slurm", __doc__)
    parser.add_argument("config", help="YAML of a run of either stage; for a preparation, with a data block")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of CONFIG")
    add = parser.add_argument
    add("--nodes", type=int, help="nodes of the job (default: 1)")
    add("--spare-nodes", type=int, metavar="N", help="further nodes, which take over from those that fail (default: 0)")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs on each node, one rank each")
    add("--tasks-per-node", type=int, metavar="N", help="ranks on each node, for a job on CPUs")
    add("--cpus-per-task", type=int, metavar="N", help="cores of each rank, or of each task of a preparation")
    add("--time", help="time limit of one job: 24:00:00, 2-12:00:00, or minutes; the run may be longer")
    add("--partition", help="partition")
    add("--account", help="account that is charged")
    add("--qos", help="quality of service")
    add("--venv", metavar="FOLDER", help="virtual environment on the nodes (default: that of this Python)")
    add("--container", metavar="COMMAND", help="goes before python3: 'apptainer exec --nv IMAGE'")
    add("--modules", metavar="A,B,...", help="environment modules to load, instead of the site file's")
    add(
        "--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch: --sbatch=--exclusive"
    )
    add("--site", type=path_argument, metavar="FILE", help="site file (default: ~/.config/hopscotch/slurm.yaml)")
    add("--job-name", metavar="NAME", help="name in the queue (default: the run folder's)")
    add("--array", metavar="KEY=A,B,...", help="one run for every value of a field: train.seed=0,1,2")
    add(
        "--then",
        nargs="+",
        action="append",
        default=[],
        metavar=("CONFIG", "key.sub=value"),
        help="stage two of the run before, once that is done",
    )
    add("--export", metavar="OUT", help="convert the last run to a Hugging Face folder, once it is done")
    add("--prepare", action="store_true", help="instead of a run, prepare its data in a job array of --tasks tasks")
    add("--tasks", type=int, metavar="N", help="with --prepare: tasks that share the parts of the data")
    add("--after", metavar="JOB", help="start when this job has ended well; the data may then not be prepared yet")
    add("--dry-run", action="store_true", help="print the scripts; submit and write nothing")
    add("--print-config", action="store_true", help="print the resolved config of every run; submit and write nothing")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
