"""Variants of one model at equal executed FLOPs: train them, measure them and compare them.

    python -m bench.isoflop bench/suites/smallest.yaml                          # minutes on two CPU cores
    python -m bench.isoflop bench/suites/small.yaml --jobs 2 --threads 1
    python -m bench.isoflop bench/suites/small.yaml tokens=1_000_000 seeds=[0] --only dense-4 skip-8 --out runs/quick
    python -m bench.isoflop bench/suites/large.yaml --slurm --gpus-per-node 8 --time 4:00:00
    python -m bench.isoflop bench/suites/large.yaml --table

A suite is a config and variants of it; docs/isoflop.md says how to write one. Every variant is one ``pretrain.train``
run per seed. Finished runs are not repeated and interrupted ones resume, so the same command can be given at any time.
Then the compute dial of learned routers and the downstream tasks are measured, and OUT gets results.md, results.csv,
loss.png, density.png, tasks.png and dial.png. Exit status: 0 when everything requested is done; 1 if a run failed, was
refused by SLURM, or differs from --against.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.common.jobs import side_by_side
from bench.common.options import parser, refuse
from bench.isoflop.report import CSV, MARKDOWN, TOLERANCE, as_csv, compare, main_table, rows, time_table, whole_report
from bench.isoflop.results import collect
from bench.isoflop.runs import dial, downstream, is_done, prepare, submit, trained_in, training
from bench.isoflop.suite import Run, Suite, load_suite, plan
from data.files import only_writer, write_atomically
from data.placeholders import TEXTS_VARIABLE
from settings import did_you_mean, path_argument, to_yaml, user_errors
from settings.project import install_command
from trainer import git_state


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, or submit it; then write the tables and pictures."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_intermixed_args(words)
    with user_errors():
        refuse(options, {"jobs": 1, "threads": 1, "ranks": 1})
        suite = load_suite(options.suite, options.overrides)
        out: Path = options.out or Path("runs") / options.suite.stem
        runs = plan(suite, out)
        chosen = _chosen(suite, runs, options.only, options.seeds)
        if options.slurm is not None:
            return _submit(suite, chosen, options, words)
        for run in runs:  # a folder with another config, chosen or not, is reported before any work
            is_done(run)
        out.mkdir(parents=True, exist_ok=True)
        failed = [] if options.table else _run(suite, chosen, options, out)
        table = _report(suite, runs, out, shlex.join(["python", "-m", "bench.isoflop", *words]), options.table)
        for problem in failed:
            print(problem, file=sys.stderr)
        if options.against is not None:
            print(compare(table, options.against))
    return 1 if failed else 0


def _chosen(suite: Suite, runs: Sequence[Run], only: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The requested runs.

    Raises:
        ValueError: if there are none.
    """
    for name in only or ():
        if name not in suite.variants:
            raise ValueError(f"--only: the suite has no variant '{name}'; {did_you_mean(name, suite.variants)}")
    chosen = [r for r in runs if (only is None or r.variant in only) and (seeds is None or r.seed in seeds)]
    if not chosen:
        there = ", ".join(map(str, dict.fromkeys(r.seed for r in runs)))
        raise ValueError(f"--seeds leaves no run; the suite's seeds are {there}, and seeds=[...] sets others")
    return chosen


def _run(suite: Suite, runs: Sequence[Run], options: argparse.Namespace, out: Path) -> list[str]:
    """Train, then measure, what is not done yet; returns a sentence for each failure."""
    _refuse_impossible(suite, runs, options.ranks)
    logs, how = out / "logs", (options.jobs, options.threads)
    with only_writer(out):
        missing = [run for run in runs if not is_done(run)]
        if missing:
            prepare(suite, missing[0])
        print(
            f"{len(runs) - len(missing)} of {len(runs)} runs are done already; what runs prints is in {logs}",
            flush=True,
        )
        failed = side_by_side([training(suite, run, options.ranks, logs) for run in missing], *how, unit="run")
        done = [run for run in runs if is_done(run)]
        wanted = [dial(run, logs) for run in done if suite.dial and run.seed == suite.first_seed(run.variant)]
        if suite.downstream is not None:
            wanted += [downstream(run, suite.downstream, logs) for run in done]
        failed += side_by_side([job for job in wanted if job is not None], *how, unit="measurement")
    return failed


def _refuse_impossible(suite: Suite, runs: Sequence[Run], ranks: int) -> None:
    """Check first what would otherwise fail only after training, or once per run.

    Raises:
        ValueError: with the problem and its fix.
    """
    for run in runs:
        try:
            run.config.accumulation(ranks)
        except ValueError as error:
            raise ValueError(f"variant {run.variant}: {error}") from None
    if suite.downstream is None:
        return
    if not Path(suite.downstream.data).is_dir():
        raise ValueError(
            f"downstream.data {suite.downstream.data} is not a folder; name the one with blimp/ and books/ ({{texts}} "
            f"is what {TEXTS_VARIABLE} names, see docs/data.md)"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "the suite has downstream tasks, but lm_eval is not installed; install it with: "
            f"{install_command('requirements-dev.txt')}, or leave them out with downstream=null"
        )


def _submit(suite: Suite, runs: Sequence[Run], options: argparse.Namespace, words: Sequence[str]) -> int:
    """Submit every unfinished run to SLURM."""
    missing = [run for run in runs if not is_done(run)]
    dry = "--dry-run" in options.slurm or "--print-config" in options.slurm
    if missing and not dry:
        prepare(suite, missing[0])
    refused = submit(suite, missing, options.slurm)
    submitted = 0 if dry else len(missing) - len(refused)
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are done, {submitted} submitted")
    again = shlex.join(["python", "-m", "bench.isoflop", *words[: words.index("--slurm")]])
    print(f"when they are done: {again}")
    print("it measures dials and downstream tasks here, then writes the tables; with --table it only writes them")
    for problem in refused:
        print(problem, file=sys.stderr)
    return 1 if refused else 0


def _report(suite: Suite, runs: Sequence[Run], out: Path, command: str, must: bool) -> list[dict[str, str]]:
    """Write tables and pictures of all finished runs, print the tables; returns the rows.

    Raises:
        ValueError: if no run is finished and ``must`` is set.
    """
    import torch

    from bench.isoflop.figures import PICTURES

    results = collect(suite, runs)
    if not results and must:
        raise ValueError(
            f"no run of the suite is done below {out}, so there is no table; leave out --table to run them"
        )
    table = rows(suite, results)
    write_atomically(out / "suite.yaml", to_yaml(suite).encode())
    write_atomically(out / CSV, as_csv(table).encode())
    commits = {path.read_text().strip() for r in results if (path := r.run.folder / "code.commit").is_file()}
    precisions = trained_in([result.run for result in results])
    made_by = [
        f"`{command}`; the suite as resolved is `suite.yaml` beside this file",
        f"the code: commit {', '.join(sorted(commits)) or 'unknown'} at the runs' last starts, "
        f"{git_state.commit() or 'unknown'} for these tables; torch {torch.__version__} here",
        f"trained in {' and '.join(precisions)}",
    ]
    write_atomically(out / MARKDOWN, whole_report(suite, results, len(runs), made_by).encode())
    written = [MARKDOWN, CSV]
    for name, draw in PICTURES.items():
        figure = draw(suite, results)
        if figure is None:
            (out / name).unlink(missing_ok=True)
            continue
        picture = io.BytesIO()
        figure.savefig(picture, dpi=110)
        write_atomically(out / name, picture.getvalue())
        written.append(name)
    print(f"\n{main_table(suite, results)}\n\nTime on this machine\n\n{time_table(suite, results)}\n")
    print(f"{len(results)} of {len(runs)} runs are done; wrote {', '.join(written)} to {out}")
    return table


def _parser() -> argparse.ArgumentParser:
    made = parser("bench.isoflop", str(__doc__))
    add = made.add_argument
    add("suite", type=path_argument, metavar="SUITE", help="YAML of a suite, for example bench/suites/small.yaml")
    add("overrides", nargs="*", metavar="key.sub=value", help="override a field of the suite: tokens=100000 seeds=[0]")
    add("--only", nargs="+", metavar="VARIANT", help="run these variants only; tables have all that is done")
    add("--seeds", nargs="+", type=int, metavar="N", help="run the suite's runs with these seeds only")
    add("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    add("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    add("--ranks", type=int, default=1, help="processes of each run, under deepspeed (default: %(default)s)")
    add(
        "--out",
        type=path_argument,
        metavar="FOLDER",
        help="run folders, logs, tables, pictures (default: runs/ and SUITE's name)",
    )
    add(
        "--against",
        type=path_argument,
        metavar="FOLDER",
        help="compare with the results.csv there, except times; exit 1 if a figure differs by more than "
        f"{TOLERANCE:g} relative. Needs the same machine type, threads and ranks: otherwise rounding alone "
        "exceeds that",
    )
    add("--table", action="store_true", help="run nothing; write tables and pictures of what is there")
    add(
        "--slurm",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="must be last: submit every run that is not done with launch.slurm and these of its options, such as "
        "--dry-run; it refuses a run whose job is in the queue",
    )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
