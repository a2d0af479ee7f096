"""A rank of a contestant of ``bench.loop``, which starts it under the ``deepspeed`` launcher."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, MutableMapping, Sequence

from bench.common.turns import Turn, TurnsOverError
from bench.loop import OURS, PEER
from settings import command_parser, path_argument, user_errors
from trainer.config import load_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Take steps until there are no more turns."""
    parser = command_parser("bench.loop.ranks", __doc__)
    parser.add_argument("kind", choices=[OURS, PEER], help="whose loop")
    parser.add_argument("config", type=path_argument, help="YAML of a stage-one run")
    parser.add_argument("name", help="of the contestant")
    parser.add_argument("port", type=int, help="of the store by which turns are given")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(arguments)
    hide_gpus(os.environ)
    with user_errors():
        config = load_run(options.config)
        from bench.loop.contestants import ours, peer
        from trainer.distributed import join, leave

        world = join(config.train.timeout_s)
        turn = Turn(options.port, options.name, world.rank)
        loops: dict[str, Callable[[], None]] = {
            OURS: lambda: ours(config, options.config, world, turn),
            PEER: lambda: peer(config, world, turn),
        }
        try:
            loops[options.kind]()
        except TurnsOverError:
            leave()
            return
    raise AssertionError("the loop ended before its turns did")


def hide_gpus(environment: MutableMapping[str, str]) -> None:
    """Hide GPUs from transformers where ranks run on the CPU: the launcher assigns device numbers all the same."""
    if environment.get("DS_ACCELERATOR") == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""


if __name__ == "__main__":
    main()
