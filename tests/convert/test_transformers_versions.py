"""Exports in the versions of transformers that their users have: each is installed in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VERSIONS = ("4.51.3", "4.57.6", "5.0.0")
ENGINE = ("ctranslate2==4.8.5", "transformers==4.57.6")
MODELS = ("layer-ensemble", "module-tied", "random", "dense")
PROGRAM, ENGINE_PROGRAM = (Path(__file__).with_name(f"other_{name}.py") for name in ("transformers", "engine"))
pytestmark = pytest.mark.slow


def run(folder: Path, exports: list[Path], library: Path | None, program: Path = PROGRAM) -> dict[str, Any]:
    """What the program finds with the packages in ``library``, or with ours."""
    paths = {} if library is None else {"PYTHONPATH": str(library)}
    environment = {**os.environ, **paths, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(program), str(folder / "found.json"), *map(str, exports)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    assert isinstance(found, dict)
    return found


def install(folder: Path, *packages: str) -> Path:
    """A folder with ``packages`` and what they need; the test is skipped where they cannot be had."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--target",
        str(folder / "library"),
        *packages,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' and '.join(packages)} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder / "library"


@pytest.fixture(scope="module")
def exports(exported: Callable[[str], tuple[Path, Path]]) -> list[Path]:
    return [exported(name)[1] for name in MODELS]


@pytest.fixture(scope="module")
def ours(exports: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("ours"), exports, None)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_export_is_the_same_model_in_every_version(
    version: str, exports: list[Path], ours: dict[str, Any], tmp_path: Path
) -> None:
    """The same logits, decisions, gradients and ids, and generation that neither cache nor padding changes."""
    theirs = run(tmp_path, exports, install(tmp_path, f"transformers=={version}"))
    assert theirs["version"] == version != ours["version"]
    for export in map(str, exports):
        found, expected = theirs[export], ours[export]
        assert not found["complaints"]
        logits = torch.tensor(expected["logits"])
        for kind in ("logits", "eager"):
            torch.testing.assert_close(torch.tensor(found[kind]), logits, rtol=0, atol=1e-4)
        made = found["generated"]
        assert made == expected["generated"]
        assert made["greedy"] == made["greedy without a cache"] == made["static cache"]
        assert made["beams"] == made["beams without a cache"] and made["padded"] == made["alone"]
        for same in ("executed", "hidden states", "ids"):
            assert found[same] == expected[same]
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["gradients"] == pytest.approx(expected["gradients"], rel=1e-3, abs=1e-6)


def test_a_dense_export_in_an_engine_of_others(exports: list[Path], ours: dict[str, Any], tmp_path: Path) -> None:
    """CTranslate2 converts it with its own converter and computes it in C++."""
    dense = exports[MODELS.index("dense")]
    prompts = torch.randint(4, 300, (3, 12), generator=torch.Generator().manual_seed(3)).tolist()
    (tmp_path / "asked.json").write_text(json.dumps({"prompts": prompts, "new_tokens": 12}))
    theirs = run(tmp_path, [dense], install(tmp_path, *ENGINE), ENGINE_PROGRAM)
    expected = ours[str(dense)]
    logits = torch.tensor(expected["logits"])
    torch.testing.assert_close(torch.tensor(theirs["logits"]), logits, rtol=0, atol=1e-4)
    assert theirs["greedy"] == expected["generated"]["greedy"]
