"""Tokenize every source and validation set into shards: ``python -m data.prepare CONFIG [key.sub=value ...]``.

A source is cut into parts (``parts.py``), each prepared in a process of its own, on all cores of one machine or, shared
out, of many: with ``--part I/N``, under ``srun``, or in a job array. The last one to finish joins the parts. The
shards are the same for any number of processes and tasks. After a kill at any moment, the same command continues after
the last finished shards and ends with the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import argparse
import os
import sys

from data.config import load_data
from data.prepare.run import files_twice, prepare, verify
from data.prepare.tasks import task_of
from data.shards import Manifest
from settings import command_parser, counted, parse_arguments, user_errors, whole_number


def _report(made: list[tuple[str, Manifest]], sequence_tokens: int) -> str:
    lines = []
    for name, manifest in made:
        text = f"{manifest.text_bytes:,} bytes of text ({manifest.text_bytes / manifest.tokens:.2f} bytes/token)"
        lines.append(
            f"{name}: {manifest.tokens:,} tokens, {manifest.documents:,} documents, "
            f"{text if manifest.text_bytes else 'read as token ids'}, {counted(len(manifest.shards), 'shard')}, "
            f"{(manifest.tokens - 1) // sequence_tokens:,} windows of {sequence_tokens:,} tokens"
        )
        for number, what in (
            (manifest.empty_documents, "left out {} without text"),
            (manifest.duplicate_documents, "left out {} with the text of an earlier one"),
            (manifest.repaired_documents, "replaced invalid Unicode by U+FFFD in {}"),
        ):
            if number:
                lines.append(f"{name}: {what.format(counted(number, 'document'))}")
    return "\n".join(lines)


def _cores() -> int:
    """Cores this process may use: in a cluster job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = command_parser(
        "python -m data.prepare",
        "Tokenize data.sources and data.validation into shards of at most data.shard_tokens tokens under "
        "data.dir. May be killed and started again: finished shards are kept. Under srun and in a job array of SLURM "
        "every task does its share.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("config", help="YAML file; only its data block is read")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for example data.shard_tokens=50000000")
    parser.add_argument(
        "--workers",
        type=whole_number(),
        default=_cores(),
        help="processes, which read and tokenize (default: all cores, %(default)s)",
    )
    parser.add_argument("--part", metavar="I/N", help="do only the share of task I, from 0 to N - 1, of N")
    parser.add_argument("--verify", action="store_true", help="write nothing; check the SHA-256 of every prepared file")
    arguments = parse_arguments(parser)
    with user_errors():
        config = load_data(arguments.config, arguments.overrides)
        if arguments.verify:
            print(_report(verify(config), config.sequence_tokens))
            print("verified: every file has the size and SHA-256 of its manifest")
            return
        task = task_of(arguments.part)
        print(_report(prepare(config, arguments.workers, task), config.sequence_tokens))
        if task.number:
            return
        for sentence in files_twice(config):
            print(f"warning: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
