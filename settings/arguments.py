"""The command line that most commands have: CONFIG, and overrides anywhere around it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from settings.paths import path_argument


def parse_arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """What ``parser``, which has the arguments ``config`` and ``overrides``, makes of ``words``.

    ``config`` is then a path, or None where it may be left out and is: the first word that is no override, or that
    names a file all the same, as ``lr=3e-4.yaml`` may.
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
