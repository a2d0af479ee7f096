"""The command of either stage: parse, name the run, meet the other ranks, train, leave."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from settings import parse_arguments, user_errors
from trainer.exit_status import EXIT_MISTAKE
from trainer.monitor.stop import lost_rank
from trainer.opening import open_run

if TYPE_CHECKING:
    from trainer.distributed import World


def run_stage(
    module: str,
    description: str,
    example: str,
    load: Callable[[Path, Sequence[str]], Any],
    train: Callable[[Any, Path, World], int],
) -> int:
    """Run the command ``module`` and return its exit status.

    Args:
        module: its name.
        description: its help.
        example: a config.
        load: reads a config and the overrides.
        train: trains, and returns the exit status.
    """
    parser = argparse.ArgumentParser(
        prog=module, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help=f"YAML of the run, for example {example}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parse_arguments(parser)
    with user_errors(EXIT_MISTAKE), lost_rank():
        config = load(arguments.config, arguments.overrides)
        open_run(config.train)
        from trainer.distributed import join, leave

        with user_errors():  # a host that does not answer now may be another one, or well, at the next start
            world = join(config.train.timeout_s, Path(str(config.train.run_dir)))
        status = train(config, arguments.config, world)
        leave()
    return status
