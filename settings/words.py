"""Formatting for messages: numbers with nouns and units, errors on one line."""

from __future__ import annotations


def counted(number: int, what: str, plural: str | None = None) -> str:
    """``1 shard``, ``2 shards``; ``plural`` where it is not ``what`` and an s."""
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"


def epochs(passes: float) -> str:
    """``2.50 epochs``, ``0.0031 epochs``."""
    return f"{passes:.2f} epochs" if passes >= 0.1 or not passes else f"{passes:.2g} epochs"


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 5 min``, ``2 d 3 h``."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of ``error``, without line breaks, at most ``most`` characters; its type if it has no message."""
    return " ".join(str(error).split())[:most] or type(error).__name__
