"""Exports of tiny models, and checkpoints of transformers to import, made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.to_hf import export
from tests.convert.exports import make
from tests.convert.hf_checkpoints import CASES, SIZES, Edit, write_tokenizer
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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each case, as transformers writes it, norms off their ones."""
    root = tmp_path_factory.mktemp("hf")

    def make(name: str) -> Path:
        config, model_class, fields = CASES[name]
        if not (root / name).exists():
            torch.manual_seed(3)
            model = model_class(config(**{**SIZES, **fields}))
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "norm" in key:
                        parameter.uniform_(0.5, 1.5)
            model.save_pretrained(root / name)
            write_tokenizer(root / name)
        return root / name

    return make


@pytest.fixture
def edited(checkpoints: Callable[[str], Path], tmp_path: Path) -> Edit:
    """A copy of the plain checkpoint (or another) with fields of its config.json set, or removed where ``...``."""

    def edit(name: str = "llama", **fields: Any) -> Path:
        folder = Path(shutil.copytree(checkpoints(name), tmp_path / "hf", dirs_exist_ok=True))
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return folder

    return edit
