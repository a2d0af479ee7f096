"""Reading a checkpoint runs no code, whatever somebody put into it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.one_rank import engine_for, save_now, take_steps
from trainer.checkpoints import manifest, resume
from trainer.checkpoints.manifest import entry_of
from trainer.checkpoints.zero_files import only_tensors
from trainer.config import PretrainConfig
from trainer.distributed import World

STATES = "deepspeed/mp_rank_00_model_states.pt"
OPTIMIZER = "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt"
PARTITIONED = "deepspeed/zero_pp_rank_0_mp_rank_00_model_states.pt"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def plant(file: Path, mark: Path) -> None:
    """Add a payload to what ``file`` holds, and make the manifest agree, so that only unpickling can object."""
    content = torch.load(file, weights_only=False)
    content["extra"] = Payload(mark)
    torch.save(content, file)
    manifest = file.parents[len(file.parts) - file.parts.index("checkpoints") - 3] / "manifest.json"
    parsed = json.loads(manifest.read_text())
    name = str(file.relative_to(manifest.parent))
    assert name in parsed["files"]
    parsed["files"][name] = entry_of(file)
    manifest.write_text(json.dumps(parsed))


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (2, "trainer.pt"),
        (2, "rng-00000.pt"),
        (0, STATES),
        (2, STATES),
        (2, OPTIMIZER),
        (3, PARTITIONED),
        (3, OPTIMIZER),
    ],
)
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    configure: Callable[..., PretrainConfig], world: World, tmp_path: Path, stage: int, name: str
) -> None:
    config = configure(f"deepspeed.zero_stage={stage}")
    folder, mark = tmp_path / "checkpoints", tmp_path / "executed"
    folder.mkdir()
    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        saved = save_now(engine, folder, 1, {"step": 1}, "f", config, world)
        resume.load(engine, saved, "f", config, world)  # as it is it loads
        plant(saved / name, mark)
        assert manifest.newest_whole(folder, world) == (saved, [])  # the hashes have nothing to say
        with pytest.raises(ValueError, match=r"holds more than tensors and numbers \(posix\.mkdir\)"):
            resume.load(engine, saved, "f", config, world)
        assert not mark.exists()
    torch.load(saved / name, weights_only=False)
    assert mark.exists()  # the payload was live


@pytest.mark.parametrize("before", [None, "0"])
def test_the_rule_is_lifted_again_after_a_load(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    allowed = set(torch.serialization.get_safe_globals())
    with pytest.raises(KeyError), only_tensors(Path("a")):
        assert os.environ[name] == "1" and len(torch.serialization.get_safe_globals()) == len(allowed) + 3
        raise KeyError
    assert os.environ.get(name) == before and set(torch.serialization.get_safe_globals()) == allowed
