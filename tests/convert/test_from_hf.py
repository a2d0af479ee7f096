"""Imports have transformers' logits and bring their tokenizer along; what would not is refused in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
)

from convert import from_hf
from convert.from_hf import compare, import_checkpoint, main, read_checkpoint
from convert.to_hf import export
from tests.convert.exports import make_tuned, write_run
from tests.convert.hf_checkpoints import CASES, Edit, change_tensors, write_tokenizer
from tests.threads import one_thread as one_thread
from tune.load import load_model


def theirs(folder: Path, tokens: Tensor) -> Tensor:
    """transformers' logits."""
    model_class = next(c for _, c, _ in CASES.values() if c.config_class.model_type in _config(folder)["model_type"])
    with torch.no_grad():
        return model_class.from_pretrained(folder, dtype=torch.float32)(tokens).logits


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = checkpoints(name)
    assert main([str(folder), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    decoder = load_model(tmp_path / "out").decoder
    tokens = torch.randint(97, (2, 96), generator=torch.Generator().manual_seed(1))
    expected = theirs(folder, tokens)
    with torch.no_grad():
        logits = decoder(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())
    assert decoder.config.tied_head == _config(folder)["tie_word_embeddings"]
    assert decoder.config.qk_norm == (name == "qwen3")
    parameters = sum(p.numel() for p in decoder.parameters())
    assert f"{name.split('-')[0]}, {parameters:,} parameters in float32" in printed
    assert "on 192 tokens, positions up to 95" in printed and "out, with tokenizer.json" in printed
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["source"] == f"Hugging Face {name.split('-')[0]} checkpoint {folder} (float32)"


def test_a_token_without_an_embedding(edited: Edit, tmp_path: Path) -> None:
    """In ``tokenizer.json``, or added by a file beside it."""
    folder = edited()
    write_tokenizer(folder, 98)
    with pytest.raises(ValueError, match=r"vocabulary is 97: there is no embedding for .*, whose id is 97; take it"):
        import_checkpoint(folder, tmp_path / "out", with_comparison=False)
    write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    with pytest.raises(
        ValueError, match=r"there is no embedding for '<pad>', whose id is 97; take it out of the token"
    ):
        import_checkpoint(folder, tmp_path / "out", with_comparison=False)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_compared_with_transformers(edited: Edit, tmp_path: Path) -> None:
    """Where transformers builds other rules than the file has, that is told."""
    folder = edited()
    lines = import_checkpoint(folder, tmp_path / "out")
    assert any(re.fullmatch(r"tokenizer ids are transformers' on [\d,]+ texts", line) for line in lines)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    lines = import_checkpoint(folder, tmp_path / "out2")
    told = next(line for line in lines if line.startswith("tokenizer "))
    assert re.search(
        r"those of tokenizer.json are taken; LlamaTokenizer in transformers gives other ids for [\d,]+ of", told
    )


def test_files_beside_the_tokenizer_reach_the_export(edited: Edit, tmp_path: Path) -> None:
    """Through the import and back; what does not is told by name."""
    folder = edited("llama")
    template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    (folder / "README.md").touch()
    (folder / "preprocessor_config.json").write_text("{}")
    lines = import_checkpoint(folder, tmp_path / "out")
    assert any("additional_chat_templates/tools.jinja" in line for line in lines if line.startswith("wrote"))
    assert "left      README.md, preprocessor_config.json" in lines
    tuned, adapter = make_tuned(load_model(tmp_path / "out").decoder, "lora")
    run = write_run(tmp_path / "run", tuned, {"dir": str(tmp_path / "out")}, adapter=adapter)
    for source in (tmp_path / "out", run):
        lines = export(source, tmp_path / f"{source.name}-again")
        assert any("chat_template.jinja" in line for line in lines)
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{source.name}-again")
        assert theirs.get_chat_template("default") == template and theirs.get_chat_template("tools") == "tools"
        assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hi"


def test_folders_that_are_no_checkpoint(edited: Edit, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*none; give a local folder with config.json and"):
        read_checkpoint(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a Hugging Face checkpoint"):
        read_checkpoint(tmp_path)
    folder = edited()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json; download"):
        read_checkpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(
        ValueError, match=r"has only pytorch_model.bin, and reading that file runs code; convert it to safet"
    ):
        read_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_checkpoint(folder)


def test_out_must_be_new_and_a_tokenizer_is_needed(
    edited: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited()
    with pytest.raises(SystemExit, match="1"):
        main([str(folder), str(folder)])
    assert (
        f"error: {folder} already exists and is not an empty folder; nothing is overwritten" in capsys.readouterr().err
    )
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"hf has no tokenizer: it holds neither tokenizer.json nor tokenizer.model"):
        import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_that_differ_are_refused(edited: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary base a tenth of a percent off; a norm's epsilon."""
    folder = edited()
    for fields in ({"rope_theta": 5005.0}, {"norm_epsilon": 1e-4}):
        with monkeypatch.context() as patched:
            wrong = from_hf.model_config
            patched.setattr(from_hf, "model_config", lambda *a, f=fields: wrong(*a).model_copy(update=f))  # noqa: B023
            with pytest.raises(ValueError, match=r"differ from transformers' by .*, above 0.0001 of their range"):
                import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_cannot_load_is_imported_without_a_comparison(edited: Edit, tmp_path: Path) -> None:
    """Its Llama wants the width to be a multiple of the heads; ours does not."""
    folder = edited("llama-tied-wide-head", num_attention_heads=3, num_key_value_heads=3, head_dim=16)
    for name in ("q", "k", "v", "o"):
        shape = (32, 48) if name == "o" else (48, 32)
        keys = [f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1)]
        change_tensors(folder, lambda t, keys=keys, shape=shape: t.update({key: torch.randn(shape) for key in keys}))
    decoder, _ = read_checkpoint(folder)
    with pytest.raises(ValueError, match=r"transformers cannot load .* to compare with \(.*\(32\) .*\); fix the check"):
        compare(decoder, folder)
    assert main([str(folder), str(tmp_path / "out"), "--no-compare"]) == 0
    assert load_model(tmp_path / "out").decoder.config.heads == 3


def test_the_help_gives_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "4 bytes a parameter" in " ".join(capsys.readouterr().out.split())
