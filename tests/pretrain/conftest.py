"""What the tests of ``trainer/`` have, too."""

from tests.trainer.conftest import configure, world

__all__ = ["configure", "world"]
