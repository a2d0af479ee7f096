"""Numbers with their nouns, for sentences that people read."""

from __future__ import annotations


def counted(number: int, what: str, plural: str | None = None) -> str:
    """``1 shard``, ``2 shards``; ``plural`` where it is not ``what`` and an s."""
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"
