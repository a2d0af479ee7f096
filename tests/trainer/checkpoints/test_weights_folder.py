"""A folder of weights gives back the decoder that was written, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from data.tokenizer_files import left_behind, tokenizer_files
from model.config import EnsembleConfig
from model.decoder import Decoder
from tests.model.tiny import config, decoder, random_tokens
from trainer.checkpoints.manifest import entry_of
from trainer.checkpoints.weights_folder import is_weights_folder, read_weights, write_weights


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with tokenizer files and others; nobody reads what is in them here."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json", "shard.bin"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def written(tmp_path: Path, tokenizer: Path) -> Path:
    """A folder of weights, to spoil."""
    write_weights(decoder(config()), tmp_path / "written", tokenizer, {"source": "a test"})
    return tmp_path / "written"


def logits(model: Decoder) -> torch.Tensor:
    """On a few random tokens, in evaluation mode."""
    with torch.no_grad():
        found = model.eval()(random_tokens()).logits
    assert found is not None
    return found


@pytest.mark.parametrize("variant", ["gqa", "mha-qk-norm", "mqa-tied-wide-head"])
@pytest.mark.parametrize("kind", ["dense", "learned", "random"])
def test_what_is_read_is_what_was_written(tmp_path: Path, tokenizer: Path, kind: str, variant: str) -> None:
    model = decoder(config(kind, variant), seed=7)
    write_weights(model, tmp_path / "deep/out", tokenizer, {"source": "a test"})
    read = read_weights(tmp_path / "deep/out")[0]
    assert is_weights_folder(tmp_path / "deep/out") and not is_weights_folder(tokenizer)
    assert read.config == model.config and not read.training and read.ensemble is None
    assert (read.lm_head.weight is read.embed_tokens.weight) == model.config.tied_head
    assert torch.equal(logits(read), logits(model))  # random routers decide by the seed


def test_an_ensemble_is_written_and_read(tmp_path: Path, tokenizer: Path) -> None:
    model = decoder(config("dense"))
    model.add_ensemble(EnsembleConfig(layers=2, temperature=2.0, final_weight=0.6))
    assert model.ensemble is not None
    with torch.no_grad():
        for parameter in model.ensemble.parameters():
            parameter.uniform_(0.5, 1.5)
    write_weights(model, tmp_path / "out", tokenizer, {})
    read = read_weights(tmp_path / "out")[0]
    assert read.ensemble is not None and read.ensemble.config == model.ensemble.config
    assert torch.equal(logits(read), logits(model))


def test_the_files(tmp_path: Path, tokenizer: Path) -> None:
    """The dtype is kept in the file and fp32 in memory; the tokenizer is copied, the manifest names all."""
    model = decoder(config("learned", "mqa-tied-wide-head")).to(torch.bfloat16)
    write_weights(model, tmp_path / "out", tokenizer, {"source": "a test"})
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    names = {"config.yaml", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    assert manifest["kind"] == "weights" and manifest["source"] == "a test" and manifest["files"].keys() == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "manifest.json"}
    blocks = {"model", "ensemble", "seed", "thresholds"}
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text()).keys() == blocks
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert all(file.get_slice(name).get_dtype() == "BF16" for name in file.keys())  # noqa: SIM118
    assert all(p.dtype == torch.float32 and p.requires_grad for p in read_weights(tmp_path / "out")[0].parameters())


def test_nothing_is_written_over_and_a_tokenizer_is_needed(tmp_path: Path, tokenizer: Path, written: Path) -> None:
    with pytest.raises(
        ValueError, match=r"written already exists and is not an empty folder; nothing is overwritten, so give another"
    ):
        write_weights(decoder(config()), written, tokenizer, {})
    with pytest.raises(
        ValueError, match=r"has no tokenizer: it holds neither tokenizer.json nor tokenizer.model; copy"
    ):
        write_weights(decoder(config()), tmp_path / "out", tmp_path, {})
    assert not (tmp_path / "out").exists()
    (tokenizer / "tokenizer.model").rename(tokenizer / "tokenizer.json")
    assert tokenizer_files(tokenizer)[0].name == "tokenizer.json"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that was killed is cleared away by the next."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/half").touch()
    with monkeypatch.context() as patched:
        # What the library calls last fails as on a full disk, in the library's own words.
        patched.setattr(
            "trainer.checkpoints.weights_folder.save_file", lambda state, path, _: save_file(state, "/dev/full/none")
        )
        with pytest.raises(OSError, match=r"model.safetensors could not be written \(.*\); free some space, or give"):
            write_weights(decoder(config()), tmp_path / "out", tokenizer, {})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/half").touch()
    write_weights(decoder(config()), tmp_path / "out", tokenizer, {})
    assert not (tmp_path / "out/half").exists() and not (tmp_path / "out.tmp").exists()


def test_files_that_were_changed_or_are_missing(written: Path) -> None:
    content = (written / "model.safetensors").read_bytes()
    (written / "model.safetensors").write_bytes(content[:-1] + b"\0")
    with pytest.raises(
        ValueError, match=r"not a complete folder of weights: the contents of model.safetensors do not match"
    ):
        read_weights(written)
    (written / "model.safetensors").write_bytes(content)
    (written / "tokenizer.model").unlink()
    with pytest.raises(
        ValueError, match=r"written is not a complete folder of weights: tokenizer.model is missing; write"
    ):
        read_weights(written)
    shutil.rmtree(written)
    with pytest.raises(ValueError, match=r"not a complete folder of weights: it has no manifest.json"):
        read_weights(written)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"ffn_width": 95},
            r"mlp.gate_proj.weight is \[96, 64\] instead of \[95, 64\]; .*; and 6 more; write it again",
        ),
        ({"layers": 4, "router": None}, r"layers.3.input_layernorm.weight is missing; .*; and 9 more"),
        ({"router": None}, r"layers.0.router.weight is not a weight of this model; .*layers.2.router.weight is not"),
    ],
)
def test_a_checkpoint_of_another_shape(written: Path, change: dict[str, Any], sentence: str) -> None:
    block = yaml.safe_load((written / "config.yaml").read_text())
    block["model"] |= change
    (written / "config.yaml").write_text(yaml.safe_dump(block))
    parsed = json.loads((written / "manifest.json").read_text())
    parsed["files"]["config.yaml"] = entry_of(written / "config.yaml")
    (written / "manifest.json").write_text(json.dumps(parsed))
    with pytest.raises(ValueError, match=rf"has weights that do not fit its config.yaml: .*{sentence}"):
        read_weights(written)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path, tokenizer: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_weights(decoder(config()), tmp_path / "out", tokenizer, {})
        assert os.umask(umask) == umask, "the process has another umask than before"
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_every_file_that_a_tokenizers_loader_reads_is_carried(tmp_path: Path, tokenizer: Path) -> None:
    names = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.4.0.0.json", "special_tokens_map.json")  # fmt: skip
    others = ("tokenizer.manifest.json", "README.md", "train/x/shard.bin", "additional_chat_templates/note.txt")
    for name in (*names, *others):
        (tokenizer / name).parent.mkdir(parents=True, exist_ok=True)
        (tokenizer / name).write_text(name)
    write_weights(decoder(config()), tmp_path / "out", tokenizer, {})
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    known = {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    assert found == {*names, *known, "config.yaml", "manifest.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == name for name in names)
    told = "README.md, additional_chat_templates/note.txt, shard.bin, tokenizer.manifest.json, train/"
    assert left_behind(tokenizer) == told
    read_weights(tmp_path / "out")
