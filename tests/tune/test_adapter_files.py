"""Adapters to files and back in one process.

What engines hand over is in tests/tune/test_load.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from model.config import EnsembleConfig
from model.decoder import Decoder
from tests.model import tiny
from tests.tune.put_back import put_back
from trainer.distributed import ALONE
from tune import adapter_files
from tune.adapter_files import save_adapter
from tune.adapters import prepare
from tune.config import AdapterConfig

kinds = pytest.mark.parametrize("kind", ["lora", "dora", "none"])


def base(**sizes: Any) -> Decoder:
    config = tiny.config()
    return tiny.decoder(type(config).model_validate({**config.model_dump(), **sizes})).eval()


def saved(folder: Path, kind: str, ensemble: bool = True, routers: str = "tuned") -> Decoder:
    """A decoder with everything that trains moved, and written to ``folder``."""
    decoder = base()
    if ensemble:
        decoder.add_ensemble(EnsembleConfig(layers=2, top=2))
    peft = prepare(decoder, AdapterConfig(kind=kind, rank=4), routers, seed=1)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    assert save_adapter(peft, decoder, folder, ALONE)
    return decoder


@kinds
@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("routers", ["frozen", "tuned"])
def test_there_and_back(tmp_path: Path, kind: str, ensemble: bool, routers: str) -> None:
    decoder, fresh = saved(tmp_path / "adapter", kind, ensemble, routers), base()
    if kind == "none" and not ensemble and routers == "frozen":  # the config refuses it
        return
    assert isinstance(put_back(fresh, tmp_path / "adapter"), PeftModel) == (kind != "none")
    state = fresh.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in decoder.state_dict().items())
    assert (fresh.ensemble.config if fresh.ensemble else None) == (decoder.ensemble.config if ensemble else None)
    tokens = tiny.random_tokens()
    assert torch.equal(fresh(tokens).logits, decoder(tokens).logits)
    assert not any(parameter.requires_grad for parameter in fresh.parameters())


def test_files_hold_what_trains_and_nothing_else(tmp_path: Path) -> None:
    decoder = saved(tmp_path, "lora", routers="frozen")
    files = {"adapter_config.json", "adapter_model.safetensors", "ensemble.json", "ensemble.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == files
    trained = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    others = load_file(tmp_path / "ensemble.safetensors").keys()
    assert others == {"norm.weight", "ensemble.norms.0.weight", "ensemble.router.weight", "ensemble.router.bias"}
    adapters = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(adapters) + len(others) == len(trained)
    assert json.loads((tmp_path / "ensemble.json").read_text())["ensemble"]["top"] == 2


def test_a_second_save_replaces_the_first_with_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    saved(folder, "lora")
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial/half").write_text("")
    saved(folder, "none")
    assert {path.name for path in folder.iterdir()} == {"ensemble.json", "ensemble.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("killed_at", "whole"), [(1, "adapter"), (2, "adapter"), (3, "adapter.removed"), (4, "adapter")]
)
def test_a_kill_at_any_moment_leaves_one_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, whole: str
) -> None:
    """While it is written; before, between and after the two names are given."""
    saved(tmp_path / "adapter", "lora")
    calls = [0]

    def killed(call: Any) -> Any:
        def one_of_them(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == killed_at:
                raise KeyboardInterrupt
            return call(*arguments)

        return one_of_them

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(adapter_files, "_write", killed(adapter_files._write))
        patched.setattr(Path, "rename", killed(Path.rename))
        patched.setattr(adapter_files, "sync", killed(adapter_files.sync))
        saved(tmp_path / "adapter", "none")
    there = {path.name for path in (tmp_path / whole).iterdir()}  # the first with adapters, the second without
    assert there == {*adapter_files.ENSEMBLE, *(adapter_files.ADAPTER if killed_at < 4 else ())}
    assert load_file(tmp_path / whole / "ensemble.safetensors")
    saved(tmp_path / "adapter", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = list[str](), os.fsync

    def noted(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.removesuffix(".tmp"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    saved(tmp_path / "adapter", "lora")
    assert {*adapter_files.ADAPTER, *adapter_files.ENSEMBLE} <= set(synced[:-1]) and synced[-1] == tmp_path.name


def test_full_tuning_is_not_saved_as_an_adapter(tmp_path: Path) -> None:
    decoder = base()
    prepare(decoder, AdapterConfig(kind="full"), "tuned", seed=1)
    assert not save_adapter(None, decoder, tmp_path / "adapter", ALONE) and not (tmp_path / "adapter").exists()
