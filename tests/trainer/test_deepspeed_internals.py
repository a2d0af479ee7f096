"""What DeepSpeed is told and asked beyond its interface; engines are in test_engine.py and test_ranks.py."""

from __future__ import annotations

import logging

from trainer.deepspeed_internals import import_deepspeed


def test_importing_again_and_again_leaves_one_filter() -> None:
    """Every weight that is gathered asks for DeepSpeed."""
    import_deepspeed()
    logger = logging.getLogger("DeepSpeed")
    before = list(logger.filters)
    assert import_deepspeed() is import_deepspeed() and logger.filters == before
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        logger.warning("A module has unknown inputs or outputs type (%s) and some tensors", "Residual")
        logger.warning("something new")
    finally:
        logger.removeHandler(handler)
    assert heard == ["something new"]
