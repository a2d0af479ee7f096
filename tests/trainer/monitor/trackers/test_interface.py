"""What trackers keep of a run for its next start."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from trainer.monitor.trackers.interface import IDS, Opening


def test_trackers_that_open_at_once_lose_no_id(tmp_path: Path) -> None:
    opening = Opening(tmp_path, "project", {}, None, None)
    ready = threading.Barrier(8)

    def keep(number: int) -> None:
        ready.wait()
        opening.keep_id(f"tracker-{number}", f"id-{number}")

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / IDS).read_text()) == {f"tracker-{n}": f"id-{n}" for n in range(8)}
