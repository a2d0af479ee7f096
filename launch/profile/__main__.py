"""Where the time and memory of a run's profiled steps went: one page from the trace of a rank.

    python -m pretrain.train my.yaml train.profile.steps=[20,25]     # writes runs/my/profile/rank-N.pt.trace.json.gz
    python -m launch.profile runs/my                                 # rank 0
    python -m launch.profile runs/my --rank 3 --layers               # another rank, every layer on its own line
    python -m launch.profile runs/my --json profile.json             # the same numbers for programs

The trace itself opens in ui.perfetto.dev and, with its plugin, in TensorBoard; phases and sites are ranges there. Exit
status: 0 when there is a trace and it can be read; 1 otherwise.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from data.files import write_atomically
from launch.profile.report import by_phase, by_site, page
from launch.profile.trace import Reader, Sums, read
from settings import command_parser, path_argument, user_errors
from trainer.monitor.phase_names import FOLDER, TRACE


def trace_of(run: Path, rank: int) -> Path:
    """The trace of a rank.

    Raises:
        ValueError: if there is none; with the ranks that have one.
    """
    path = run / FOLDER / f"rank-{rank}{TRACE}"
    if path.is_file():
        return path
    ranks = sorted(int(p.name.removesuffix(TRACE).removeprefix("rank-")) for p in path.parent.glob(f"rank-*{TRACE}"))
    if ranks:
        raise ValueError(f"{run} has no trace of rank {rank}; give --rank one of {', '.join(map(str, ranks))}")
    raise ValueError(
        f"{run} has no trace in {FOLDER}/; run it with train.profile.steps=[20,25], and give the folder that "
        "train.run_dir names"
    )


def summed(path: Path) -> Sums:
    """The trace at ``path``, summed up.

    Raises:
        ValueError: if it is damaged, or not one of ours.
    """
    try:
        return Reader(read(path)).sums
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a trace of torch.profiler ({error}); profile the steps again") from error


def main() -> int:
    """Print the page."""
    parser = command_parser("launch.profile", __doc__)
    parser.add_argument("run", type=path_argument, help="run folder: train.run_dir, for example runs/demo")
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="rank whose trace is read (0)")
    parser.add_argument("--layers", action="store_true", help="list the sites of every layer separately")
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the rows, in ms and MB a step")
    arguments = parser.parse_args()
    with user_errors():
        path = trace_of(arguments.run, arguments.rank)
        sums = summed(path)
        print(page(sums, f"{path}", arguments.layers))
        if arguments.json is not None:
            rows = {"phases": by_phase(sums), "sites": by_site(sums, each_layer=True)}
            found = {"steps": sums.steps, "step_ms": sums.in_steps / sums.steps / 1e3}
            write_atomically(
                arguments.json,
                json.dumps(found | {name: [asdict(row) for row in listed] for name, listed in rows.items()}).encode(),
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
