"""All checks that need a GPU, in one time-limited command: what ``make gpu`` runs.

    python -m bench.gpu                                    # ten minutes on a CUDA device, into runs/gpu
    python -m bench.gpu --wheels wheels --minutes 8        # first installs what is missing, see bench.gpu.wheels
    python -m bench.gpu --only training decode             # some parts; an earlier folder is kept under another name
    python -m bench.gpu --device cpu                       # a rehearsal of the same commands with tiny sizes

Parts run one after the other, the most valuable first, each as its own command with a time limit: its share of the
remaining time. A part that fails or is killed at its limit is reported, and the next one starts. --out gets a log and a
JSON file of results for each, and summary.md and summary.json, rewritten before and after every part. Ctrl-C or SIGTERM
ends the running part with all its processes. The exit status is 0 only if all parts passed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu.wheels import install

if TYPE_CHECKING:
    from bench.gpu.schedule import Schedule


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what is missing and run all parts; returns the exit status."""
    began_s = time.monotonic()
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        site = Path(folder) / "site"
        try:
            installed = [] if options.wheels is None else install(options.wheels, site)
        except ValueError as error:  # settings.user_errors may itself need a package that could not be installed
            print(f"error: {error}", file=sys.stderr)
            return 1
        sys.path.append(str(site))
        from settings import user_errors

        with user_errors():
            return run(options, Path(folder), installed, began_s + 60 * options.minutes)


def run(options: argparse.Namespace, folder: Path, installed: Sequence[str], deadline_s: float) -> int:
    """Run all parts, with ``folder`` for packages and temporary files; returns the exit status."""
    from bench.gpu.parts import chosen, lacking_for_tests, parts
    from bench.gpu.schedule import Schedule
    from bench.gpu.summary import MARKDOWN, headline, write
    from settings.project import ROOT
    from trainer.git_state import commit

    if not 0 < options.minutes < float("inf"):  # settings.positive_number may need what has to be installed first
        raise ValueError(f"--minutes must be a number above 0, got {options.minutes:g}")
    out: Path = options.out.absolute()
    todo = chosen(parts(options.device, out), options.only)
    _make_room(out)
    about = {
        "commit": commit() or "not known",
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "device": options.device if options.device == "cuda" else "cpu: a rehearsal with tiny sizes, no measurement",
        "time": f"{options.minutes:g} minutes",
        "installed first": ", ".join(installed) or "nothing",
    }
    if lack := lacking_for_tests(part.name for part in todo):
        about["note"] = lack
        print(f"note: {lack}", flush=True)

    def tell(schedule: Schedule) -> None:
        write(out, schedule.outcomes, about)
        _show(schedule)

    schedule = Schedule(todo, out, deadline_s, _environment(folder, options.device), ROOT, tell)
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # SIGABRT asks a part for its stacks; it must not dump core
    print(f"{len(todo)} parts in {options.minutes:g} minutes, into {options.out}", flush=True)
    schedule.run()
    print(f"{headline(schedule.outcomes)}; see {options.out / MARKDOWN}", flush=True)
    return 128 + schedule.signal if schedule.signal else int(not schedule.passed)


def _make_room(out: Path) -> None:
    """Make ``out`` an empty folder; results of an earlier command are kept beside it.

    Raises:
        ValueError: if something else is in the way.
    """
    from bench.gpu.summary import JSON

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} must be a folder, but is a file; give another name")
    if out.is_dir() and any(out.iterdir()):
        if not (out / JSON).is_file():
            raise ValueError(f"--out {out} holds something other than an earlier summary; give another folder")
        out.rename(out.with_name(f"{out.name}-before-{time.strftime('%Y%m%d-%H%M%S')}"))
    out.mkdir(parents=True, exist_ok=True)


def _environment(folder: Path, device: str) -> dict[str, str]:
    """Environment of the parts: installed packages, unbuffered output, temporary files where they will be removed."""
    path = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    (folder / "tmp").mkdir()
    own = {"PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(folder / "tmp"), "PYTHONUNBUFFERED": "1"}
    own |= {"PYTHONFAULTHANDLER": "1", "TQDM_DISABLE": "1"}
    if device == "cpu":
        own |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return os.environ | own


def _show(schedule: Schedule) -> None:
    """Print a line when a part starts and when it has ended."""
    from bench.gpu.schedule import RUNNING, WAITING

    begun = [outcome for outcome in schedule.outcomes if outcome.status != WAITING]
    if not begun:
        return
    last = begun[-1]
    if last.status == RUNNING:
        print(f"{last.part.name:26} at most {last.limit_s:.0f} s: {last.part.what}", flush=True)
        return
    key = "" if last.figures is None else last.figures.key
    details = "; ".join(text for text in (last.reason, key) if text)
    print(f"{last.part.name:26} {last.status}, {last.seconds:.0f} s{': ' * bool(details)}{details}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="minutes of wall time in all (default: %(default)g)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder for all results (default: %(default)s)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels from which missing packages are installed")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run only these parts (default: all)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
