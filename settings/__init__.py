"""YAML file + command-line overrides -> a strict typed object, or one clear sentence saying why not."""

from settings.arguments import command_parser, parse_arguments, positive_number, whole_number
from settings.load import flatten, load, peek, to_yaml
from settings.paths import PathText, path_argument, require_writable, shown
from settings.strict import Strict
from settings.suggestions import did_you_mean
from settings.user_errors import looks_first, rank_by_environment, ranks_by_environment, user_errors
from settings.words import counted, one_line

__all__ = [
    "PathText",
    "Strict",
    "command_parser",
    "counted",
    "did_you_mean",
    "flatten",
    "load",
    "looks_first",
    "one_line",
    "parse_arguments",
    "path_argument",
    "peek",
    "positive_number",
    "rank_by_environment",
    "ranks_by_environment",
    "require_writable",
    "shown",
    "to_yaml",
    "user_errors",
    "whole_number",
]
