"""Take a run back to an earlier checkpoint, so that it goes on from there another way.

    python -m launch.rewind runs/my 4000

What was done after that step is moved to RUN/checkpoints/abandoned-N; nothing is deleted. Then start the run again,
with train.checkpoint.resume=required and what is to be different: data.skip_ranges to pass over samples, a lower
train.optimizer.lr, another data.seed. Exit status: 0 when step STEP is the newest; 1 on an error, nothing moved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from settings import user_errors


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and move."""
    parser = argparse.ArgumentParser(
        prog="launch.rewind", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, for example runs/my")
    parser.add_argument("step", type=int, help="optimiser steps done at the checkpoint to go back to")
    options = parser.parse_args(arguments)
    with user_errors():
        from trainer.rewind import go_back

        abandoned = go_back(options.run, options.step)
    if abandoned is None:
        print(f"nothing was done after step {options.step:,}; start again with train.checkpoint.resume=required")
        return 0
    moved = ", ".join(sorted(path.name for path in abandoned.iterdir()))
    print(
        f"{abandoned} now has {moved}; remove it when you like. Step {options.step:,} is the newest: start again with "
        "train.checkpoint.resume=required"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
