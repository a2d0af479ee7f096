"""The command line that most commands have: CONFIG, and overrides anywhere around it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from settings.paths import path_argument


def command_parser(prog: str, description: str | None, **more: Any) -> argparse.ArgumentParser:
    """The parser of a command: ``description`` is shown as it is written, and options must be written in full.

    argparse accepts unambiguous prefixes of options, so an argument meant for another program could match one, and a
    new option could change the meaning of a command line.

    Args:
        prog: name of the command.
        description: its help.
        more: further arguments of argparse.ArgumentParser.
    """
    shown = {"formatter_class": argparse.RawDescriptionHelpFormatter} | more
    return argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, **shown)


def parse_arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``words`` with ``parser``, which has the arguments ``config`` and ``overrides``.

    ``config`` is then a path: the first word that is not an override, or that names a file in spite of its ``=``, such
    as ``lr=3e-4.yaml``. It is None where it is optional and left out.
    """
    if not (sys.argv[1:] if words is None else words) and any(
        action.dest == "config" and action.nargs is None for action in parser._actions
    ):
        parser.error("give a config, for example: configs/mine.yaml")
    options = parser.parse_intermixed_args(words)
    given = [word for word in (options.config, *options.overrides) if word is not None]
    if given:
        config = given.pop(next((at for at, word in enumerate(given) if "=" not in word or os.path.isfile(word)), 0))
        try:
            options.config, options.overrides = path_argument(config), given
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
    return options


def whole_number(least: int = 1) -> Callable[[str], int]:
    """``type`` of an argument that counts something: a whole number, ``least`` or more."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got '{text}'")
        return value

    return number


def positive_number(most: float = 1e12) -> Callable[[str], float]:
    """``type`` of an argument that is a size, a time, a rate or a share: a number above 0, ``most`` or less."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most:  # nor NaN
            raise argparse.ArgumentTypeError(f"must be a number above 0, at most {most:g}, got '{text}'")
        return value

    return number
