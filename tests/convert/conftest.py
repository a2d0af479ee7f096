"""Exports of tiny models, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.to_hf import export
from tests.convert.exports import make
from tests.once import once
from trainer.checkpoints.weights_folder import write_weights


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]
) -> Iterator[Callable[[str], tuple[Path, Path]]]:
    """Takes a case's name; gives its folder of weights and its export."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models so small that a second thread only waits for the first

    def folders(name: str) -> tuple[Path, Path]:
        def write(folder: Path) -> None:
            write_weights(make(name), folder / name, Path(corpus["dir"]), {"source": "a test"})
            export(folder / name, folder / f"{name}-hf")

        folder = once(tmp_path_factory, f"export-{name}", write)
        return folder / name, folder / f"{name}-hf"

    yield folders
    torch.set_num_threads(threads)
