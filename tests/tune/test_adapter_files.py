"""Adapters to files and back in one process, and everything that a folder can be besides right.

What engines hand over is in tests/tune/test_load.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from model.config import EnsembleConfig
from model.decoder import Decoder
from tests.model import tiny
from trainer.distributed import World
from tune.adapter_files import load_adapter, save_adapter
from tune.adapters import prepare
from tune.config import AdapterConfig

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
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
    assert isinstance(load_adapter(fresh, tmp_path / "adapter"), PeftModel) == (kind != "none")
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


def test_full_tuning_is_not_saved_as_an_adapter(tmp_path: Path) -> None:
    decoder = base()
    prepare(decoder, AdapterConfig(kind="full"), "tuned", seed=1)
    assert not save_adapter(None, decoder, tmp_path / "adapter", ALONE) and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_pefts_own_files_are_read(tmp_path: Path, kind: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=kind == "dora", init_lora_weights=False)
    peft = get_peft_model(base(), config)
    peft.save_pretrained(str(tmp_path))
    fresh = base()
    load_adapter(fresh, tmp_path)
    state = fresh.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in peft.base_model.model.state_dict().items())


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:20])


def _entry(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content[key] = value
        (folder / name).write_text(json.dumps(content))

    return change


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "ensemble.safetensors")
    del tensors["ensemble.router.bias"]
    save_file(tensors, folder / "ensemble.safetensors")


def _other_kind(folder: Path) -> None:
    peft = get_peft_model(base(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    peft.save_pretrained(str(folder))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (_without(WEIGHTS), "holds adapter_config.json without adapter_model.safetensors; copy the whole"),
    "no config": (_without(CONFIG), "holds adapter_model.safetensors without adapter_config.json; copy the whole"),
    "no block": (_without("ensemble.json"), "holds ensemble.safetensors without ensemble.json; copy the whole"),
    "no norms": (_without("ensemble.safetensors"), "holds ensemble.json without ensemble.safetensors; copy the whole"),
    "torn weights": (_cut(WEIGHTS), r"adapter_model.safetensors is not a whole safetensors file \(.*\); copy it again"),
    "torn norms": (_cut("ensemble.safetensors"), r"ensemble.safetensors is not a whole safetensors file \(.*\); copy"),
    "torn config": (_cut(CONFIG), "adapter_config.json is not valid JSON"),
    "torn block": (_cut("ensemble.json"), "ensemble.json is not valid JSON"),
    "other block": (
        _entry("ensemble.json", "ensemble", {"layers": 0}),
        r"holds no ensemble block \(Input should be gr",
    ),
    "other file": (lambda f: (f / "ensemble.json").write_text("{}"), r"\(it has no 'ensemble' entry\); save the adap"),
    "too many": (_entry("ensemble.json", "ensemble", {"layers": 4}), r"ensemble.layers \(4\) must not exceed the dec"),
    "other k": (
        _entry("ensemble.json", "ensemble", {"layers": 3}),
        r"trained on another model: ensemble.norms.1.weight is missing; ensemble.router.weight is \[2, 64\] instead of",
    ),
    "no router": (_drop_tensor, "was trained on another model: ensemble.router.bias is missing; give the model that"),
    "targets": (_entry(CONFIG, "target_modules", ["c_attn", "c"]), r"none of its targets \(c, c_attn\) is in this mo"),
    "pattern": (_entry(CONFIG, "target_modules", "h.*attn"), r"an adapter for other modules: none of its targets \(h"),
    "fewer": (_entry(CONFIG, "target_modules", ["q_proj"]), "down_proj.lora_A.weight is not a weight of this model"),
    "rank": (_entry(CONFIG, "r", 5), r"q_proj.lora_A.weight is \[4, 64\] instead of \[5, 64\]"),
    "more": (
        _entry(CONFIG, "modules_to_save", ["norm"]),
        "a LoRA or DoRA adapter and of nothing else, got LORA with modu",
    ),
    "kind": (_other_kind, "must be of a LoRA or DoRA adapter and of nothing else, got .*IA3; give another one"),
    "no kind": (lambda f: (f / CONFIG).write_text("{}"), "of a LoRA or DoRA adapter and of nothing else, got None"),
    "unknown": (
        _entry(CONFIG, "peft_type", "X"),
        r"adapter_config.json is nothing that PEFT can use \('X'\); save the",
    ),
    "typed": (_entry(CONFIG, "lora_alpha", "a"), "is nothing that PEFT can use .*unsupported operand"),
    "nought": (_entry(CONFIG, "r", 0), "is nothing that PEFT can use .*should be a positive integer"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_folder_that_was_spoilt(tmp_path: Path, name: str) -> None:
    saved(tmp_path, "lora")
    spoil, sentence = SPOILT[name]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_adapter(base(), tmp_path)


def test_a_folder_without_anything(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no adapter \(adapter_config.json and .* give the folder that a tuning"
    ):
        load_adapter(base(), tmp_path / "none")


@kinds
@pytest.mark.parametrize("sizes", [{"width": 32}, {"layers": 2}, {"layers": 4}, {"ffn_width": 80}], ids=str)
def test_another_model(tmp_path: Path, kind: str, sizes: dict[str, int]) -> None:
    saved(tmp_path, kind)
    if kind == "none" and (sizes == {"layers": 4} or "ffn_width" in sizes):
        return  # the ensemble alone fits
    with pytest.raises(ValueError, match=r"was trained on another model: .*; give the model that it was trained on"):
        load_adapter(base(**sizes), tmp_path)
