"""Weights of checkpoints: in shards, tied, under wrappers' names; and those that are missing, damaged or no numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
)

from convert.from_hf import import_checkpoint, read_checkpoint
from tests.convert.hf_checkpoints import Edit, change_tensors
from tests.threads import one_thread as one_thread
from tune.load import load_model


def test_shards_and_bf16(edited: Edit, tmp_path: Path) -> None:
    """The dtype is kept; the comparison is in fp32."""
    folder = edited("llama")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    lines = import_checkpoint(folder, tmp_path / "out")
    assert "parameters in bfloat16" in lines[0]
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored.keys() == {name.removeprefix("model.") for name in model.state_dict()}
    assert all(torch.equal(stored[name.removeprefix("model.")], t) for name, t in model.state_dict().items())

    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model-00002-of-\d+.safetensors is damaged \(.*\); download it again"):
        read_checkpoint(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"model-00002.*, which model.safetensors.index.json names, is not there"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match=r"index.json has no weight_map from tensors to files; download it again"):
        read_checkpoint(folder)


def test_an_index_that_leads_out_of_the_folder(edited: Edit, tmp_path: Path) -> None:
    """Up, absolute (even to the folder itself), by a link to a file, by a link to a folder; links inside are fine."""
    folder = edited()
    whole = (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(whole)
    (folder / "up").symlink_to(tmp_path)
    inside = Path(shutil.copy(whole, folder / "inside.safetensors"))
    names = ("../outside.safetensors", "up/../hf/inside.safetensors", str(whole), str(inside), "link.safetensors",
             "up/outside.safetensors")  # fmt: skip
    for name in names:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(
            ValueError, match=rf"index.json names {re.escape(name)}, which is outside .*hf, and only files in it"
        ):
            read_checkpoint(folder)
    (folder / "other.safetensors").symlink_to("inside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert read_checkpoint(folder)[1] == "llama"


def test_a_tied_head_that_is_stored_as_well(edited: Edit) -> None:
    folder = edited("llama-tied-wide-head")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert read_checkpoint(folder)[0].config.tied_head
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"has a separate head, but its config.json sets tie_word_embeddings; set"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["llama-tied-wide-head", "qwen3"])
def test_tied_weights_that_are_stored_as_the_head_alone(edited: Edit, tmp_path: Path, name: str) -> None:
    """As safetensors' ``save_model`` keeps one of two names."""
    folder = edited(name)
    before = read_checkpoint(folder)[0].embed_tokens.weight.clone()
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    lines = import_checkpoint(folder, tmp_path / "out")
    decoder = load_model(tmp_path / "out").decoder
    assert torch.equal(decoder.embed_tokens.weight, before) and decoder.lm_head.weight is decoder.embed_tokens.weight
    assert any("logits are transformers'" in line for line in lines)
    # Of a model whose head is not tied nothing can stand in for the embedding.
    folder = edited("llama")
    change_tensors(folder, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"describes: embed_tokens.weight is missing"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
        lambda name: name.replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."),
    ],
    ids=["compiled", "distributed", "both", "trainer", "bare", "a layer compiled", "wrapped"],
)
def test_names_with_what_wrappers_put_into_them(edited: Edit, tmp_path: Path, spell: Callable[[str], str]) -> None:
    folder = edited()
    before = read_checkpoint(folder)[0].state_dict()
    change_tensors(folder, lambda t: [t.update({spell(name): t.pop(name)}) for name in list(t)])
    lines = import_checkpoint(folder, tmp_path / "out")
    after = load_model(tmp_path / "out").decoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any("logits are transformers'" in line for line in lines)


def test_two_names_of_one_weight(edited: Edit) -> None:
    folder = edited()
    change_tensors(folder, lambda t: t.update({"_orig_mod.model.norm.weight": torch.ones(32)}))
    with pytest.raises(
        ValueError, match=r"holds .*norm.weight and .*norm.weight, which are two names of one weight; keep"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(edited: Edit, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """Refused by name, with the comparison and without."""
    folder, name = edited(), "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5] = value

    change_tensors(folder, spoil)
    for with_comparison in (True, False):
        with pytest.raises(ValueError, match=rf"{name} in .* has 1 of 1,536 values that are NaN or infinite"):
            import_checkpoint(folder, tmp_path / "out", with_comparison)
    assert not (tmp_path / "out").exists()


def test_buffers_of_old_versions_are_passed_over(edited: Edit) -> None:
    folder = edited()
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert read_checkpoint(folder)[1] == "llama"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.norm.weight"), r"describes: norm.weight is missing; download both again"),
        (lambda t: t.pop("lm_head.weight"), r"describes: lm_head.weight is missing"),
        (lambda t: t.update(extra=torch.ones(2)), r"describes: extra is not a weight of this model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm.weight is \[3\] instead of \[32\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).char()}),
            r"is I8, but weights must be float32, .*bfl",
        ),
    ],
)
def test_weights_that_are_not_the_configs(
    edited: Edit, change: Callable[[dict[str, Tensor]], Any], sentence: str
) -> None:
    folder = edited()
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=sentence):
        read_checkpoint(folder)
