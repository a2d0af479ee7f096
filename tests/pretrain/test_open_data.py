"""Of thousands of ranks one looks at all shards; the others read manifests, and a shard when it is their turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.train import open_data
from tests.system_calls import counted
from trainer.config import PretrainConfig
from trainer.distributed import World

TOLD: list[Any] = []
"""What rank 0 has broadcast."""


class Fake(World):
    """One rank of many that do not run."""

    def broadcast_object(self, value: Any) -> Any:
        if self.is_main:
            TOLD[:] = [value]
        return TOLD[0]


def rank(number: int, ranks: int) -> World:
    return Fake(number, ranks, 0, 8, torch.device("cpu"))


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: Path) -> PretrainConfig:
    """The tiny run's data, 64 times over: in as many shards."""
    shutil.copytree(tiny["data"]["dir"], tmp_path / "data")
    tiny["data"]["dir"] = str(tmp_path / "data")
    folder = tmp_path / "data/train/code"
    manifest = json.loads((folder / "manifest.json").read_text())
    (shard,) = manifest["shards"]
    for number in range(1, 64):
        name = f"shard-{number:05d}"
        files = {path.replace(shard["name"], name): entry for path, entry in shard["files"].items()}
        for old, new in zip(shard["files"], files, strict=True):
            (folder / new).hardlink_to(folder / old)
        manifest["shards"].append(shard | {"name": name, "files": files})
    manifest |= {key: 64 * manifest[key] for key in ("tokens", "documents", "text_bytes")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return PretrainConfig.model_validate(yaml.safe_load(yaml.safe_dump(tiny)))


@pytest.mark.parametrize("ranks", [64, 512, 2048])
def test_calls_for_shards_are_those_of_one_rank(config: PretrainConfig, ranks: int) -> None:
    with counted() as first:
        data, _ = open_data(config, rank(0, ranks))
    assert 2 * 64 <= first["stat"] <= 2 * 64 + 20
    with counted() as other:
        lazily, (validation,) = open_data(config, rank(ranks - 1, ranks))
    assert other.total() <= 30
    assert lazily.fingerprint == data.fingerprint and validation.samples > 0
    assert torch.equal(lazily.batch(range(8)).tokens, data.batch(range(8)).tokens)


def test_what_rank_0_finds_ends_all_ranks_with_its_sentence(config: PretrainConfig) -> None:
    shard = Path(config.data.dir) / "train/code/shard-00063.ends"
    shard.unlink()
    for number in (0, 1):
        with pytest.raises(ValueError, match=rf"{shard} is missing; restore it, or remove .* and prepare again"):
            open_data(config, rank(number, 2))


def test_a_shard_that_only_this_rank_sees_cut_is_named_when_it_is_used(config: PretrainConfig) -> None:
    """As a stale copy on one machine is; all shards, which are links to one file."""
    TOLD[:] = [None]
    shard = Path(config.data.dir) / "train/code/shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    (shard.parent / "manifest.json").touch()
    data, _ = open_data(config, rank(1, 2))
    with pytest.raises(ValueError, match=rf"{shard.parent}/shard-\d+\.bin was changed after it was prepared"):
        data.batch(range(8))
