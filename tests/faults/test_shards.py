"""A shard that changes under a run is named, and nothing of it is trained on. See also ``tests/data/test_store.py``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import Ranks
from trainer.checkpoints import manifest
from trainer.distributed import ALONE
from trainer.exit_status import EXIT_MISTAKE, EXIT_STALLED


def cut(shard: Path) -> None:
    """In place: to touch a page that is mapped and no longer there would be SIGBUS."""
    with shard.open("r+b") as file:
        file.truncate(100)


def overwrite(shard: Path) -> None:
    """In place, by other tokens of the vocabulary."""
    content = shard.read_bytes()
    with shard.open("r+b") as file:
        file.write(content[2:] + content[:2])


@pytest.mark.slow
@pytest.mark.parametrize("change", [cut, overwrite])
def test_a_shard_that_is_changed_ends_the_run_and_the_next_start(
    tiny, write_config, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(tiny["data"]["dir"], tmp_path / "data"))
    tiny["data"]["dir"] = str(folder)
    shard, config = folder / "train/code/shard-00000.bin", write_config(tiny)
    whole = shard.read_bytes()
    with Ranks(config) as ranks:
        ranks.wait_until(lambda: ranks.output.count("saved ") == 2)
        change(shard)
        statuses = ranks.end()
        assert EXIT_MISTAKE in statuses and set(statuses) <= {EXIT_MISTAKE, EXIT_STALLED}
        assert re.search(f"error: {shard} was changed after it was prepared: its SHA-256 differs", ranks.output)
        assert "Traceback" not in ranks.output
    newest, _ = manifest.newest_whole(Path(tiny["train"]["run_dir"]) / "checkpoints", ALONE)
    assert newest is not None
    with Ranks(config) as ranks:
        assert EXIT_MISTAKE in ranks.end()
        assert f"error: {shard} " in ranks.output and "Traceback" not in ranks.output
    shard.write_bytes(whole)  # restored: newer than the manifest, and the bytes that it counts
    with Ranks(config) as ranks:
        ranks.wait_until(lambda: "with its SHA-256, because it was modified" in ranks.output)
        ranks.processes[0].terminate()
        ranks.end()
        assert f"at step {int(newest.name[5:])}" in ranks.output
