"""The routing report: which tokens use how many layers, as one HTML page for people who did not write the code.

    python -m evals.routing runs/books-z2                                # on its validation set
    python -m evals.routing runs/books-z2 novel.txt --tokens 50000 --out novel.html

The page (``evals/routing/page.py``) needs no network and no script. It shows a text coloured by the layers that its
tokens ran, densities by layer, position, class and frequency of the token, the most and the least executed of the
frequent tokens, densities over training if the run's metrics are available, and the vote of a late-layer ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.files import write_atomically
from evals.placement import add_placement, check_placement, placed
from evals.routing import FEWEST
from evals.routing.page import page
from evals.texts import add_text_options, text_files
from settings import command_parser, path_argument, require_writable, user_errors
from trainer import preflight
from trainer.checkpoints.layout import run_of

NAME = "routing.html"
TOKENS = 16_384
"""How many tokens are run unless the user says otherwise."""


def _name_of(path: Path) -> str:
    """The model's name on the page."""
    path = path.resolve()
    run = run_of(path)
    return path.name if run is None or run == path else f"{run.name}, {path.name}"


def _out(path: Path, given: Path | None) -> Path:
    """Where to write; an error is raised before the work, not after it."""
    out = given
    if out is None:
        run = run_of(path)
        if run is None:
            raise ValueError(f"{path} is not in a run folder; say with --out where to write")
        out = run / NAME
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must end in .html, got {out}; a report is a page for a browser")
    require_writable(out, "--out")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Load, run, write the page."""
    parser = command_parser("evals.routing", __doc__)
    parser.add_argument(
        "path",
        type=path_argument,
        metavar="MODEL",
        help="a run of either stage, one of its checkpoints, or a folder of weights",
    )
    parser.add_argument("files", nargs="*", metavar="FILES", help="text files (default: the run's validation set)")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"about how many tokens to run (default {TOKENS})"
    )
    add_text_options(parser)
    parser.add_argument("--out", type=path_argument, metavar="FILE", help=f"an .html file (default: RUN/{NAME})")
    add_placement(parser)
    options = parser.parse_args(arguments)
    with user_errors():
        check_placement(options)
        if options.tokens < FEWEST:
            raise ValueError(
                f"--tokens must be at least {FEWEST} for a meaningful report, got {options.tokens}; raise it"
            )
        preflight.open_model(options.path)
        out = _out(options.path, options.out)
        files = text_files(options.files, options.format) if options.files else []
        from evals.routing.report import report_on

        with placed(options) as placement:
            loaded, name = placement.load(options.path), _name_of(options.path)
        report = report_on(loaded, files, options.tokens, name, options.format, options.text_field)
        for label, value in report.facts:
            print(f"{label}: {value}")
        content = page(report).encode()
        write_atomically(out, content)
        print(f"wrote {out} ({len(content) / 1000:,.0f} kB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
