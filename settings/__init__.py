"""YAML file + command-line overrides -> a strict typed object, or one clear sentence saying why not."""

from settings.load import load, to_yaml
from settings.near import did_you_mean
from settings.parse import parse_yaml
from settings.strict import Strict
from settings.user_errors import rank_by_environment, user_errors
from settings.words import counted

__all__ = [
    "Strict",
    "counted",
    "did_you_mean",
    "load",
    "parse_yaml",
    "rank_by_environment",
    "to_yaml",
    "user_errors",
]
