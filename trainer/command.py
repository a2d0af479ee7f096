"""The command line of both stages: parse arguments, check the run, join the other ranks, train, leave."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from settings import command_parser, parse_arguments, peek, ranks_by_environment, user_errors
from trainer.exit_status import EXIT_MISTAKE
from trainer.monitor.stop import exit_on_lost_rank
from trainer.preflight import open_run

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
        module: the command's module name.
        description: the help text.
        example: path of an example config, for the help text.
        load: loads a config with its overrides.
        train: trains, and returns the exit status.
    """
    parser = command_parser(module, description)
    parser.add_argument("config", help=f"YAML of the run, for example {example}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the config")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parse_arguments(parser)
    with user_errors(EXIT_MISTAKE), exit_on_lost_rank():
        _require_stage(module, arguments.config)
        config = load(arguments.config, arguments.overrides)
        config.train.refuse_to_start()
        config.train.accumulation(ranks_by_environment(), config.deepspeed)
        open_run(config.train)
        grow_segments(os.environ)
        from trainer.distributed import join, leave

        with user_errors():  # the next start may get another host, or this one may have recovered
            world = join(config.train.timeout_s, Path(str(config.train.run_dir)))
        world = world.sharing_windows(config.deepspeed, config.train.timeout_s)
        status = train(config, arguments.config, world)
        del world  # refers to a process group
        leave()
    return status


def _require_stage(module: str, path: Path) -> None:
    """Refuse a config of the other stage early: it would only yield errors about unknown keys."""
    blocks = peek(path)
    if blocks.keys() & {"base", "model"} and ("base" in blocks) != (module == "tune.train"):
        stage, block, command = ("two", "base", "tune") if "base" in blocks else ("one", "model", "pretrain")
        raise ValueError(
            f"{path} is a config of stage {stage}, as it has a block '{block}'; start it with: python -m "
            f"{command}.train {path}"
        )


def grow_segments(environment: MutableMapping[str, str]) -> None:
    """Turn on expandable segments in torch's CUDA allocator, unless the user has configured it.

    Call before torch is imported, which reads the variable. The number of executed tokens differs from step to step, so
    the requested block sizes keep changing, which fragments fixed-size segments (torch's notes on CUDA, "Memory
    management").
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
