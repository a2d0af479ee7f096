"""An export has our logits and our continuations, needs nothing of ours, and never takes the place of anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from convert import to_hf
from convert.from_hf import import_checkpoint
from convert.to_hf import export, main
from data.tokenization import load_text_tokenizer
from model.config import ModelConfig
from model.decoder import Decoder
from model.generate import generate
from tests.conftest import VOCAB
from tests.convert.exports import CASES, NATIVE, make, make_tuned, write_run
from tests.convert.hf_checkpoints import write_tokenizer
from tests.model.tiny import SIZES, decoder
from tests.trainer.checkpoints.test_resume_safety import Payload
from trainer.checkpoints import manifest, weights_folder
from trainer.checkpoints.weights_folder import write_weights
from tune import adapter_files
from tune.load import load_model

Exported = Callable[[str], tuple[Path, Path]]


def load(folder: Path, **options: Any) -> Any:
    """The export in transformers, every weight found."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, output_loading_info=True, **options
    )
    assert not any(found.values())
    return model.eval()


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = decoder(tokens).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_continuation(exported: Exported, name: str) -> None:
    weights, out = exported(name)
    ours, theirs, tokens = load_model(weights).decoder, load(out), random_ids(3, 100)
    assert type(theirs).__name__ == f"{NATIVE.get(name, 'Hopscotch')}ForCausalLM"
    assert (out / to_hf.MODELING).exists() == (name not in NATIVE)
    with torch.no_grad():
        assert float((theirs(tokens).logits - logits_of(ours, tokens)).abs().max()) < 1e-4
    theirs.generation_config.eos_token_id = None
    continued = theirs.generate(tokens[:1, :6], max_new_tokens=64, do_sample=False, pad_token_id=3)
    assert torch.equal(continued, generate(ours, tokens[:1, :6], 64))


@pytest.mark.parametrize("name", ["dense", "dense-tied-llama3", "dense-qk-norm", "module-tied", "module-ensemble"])
def test_weights_are_ours_bit_by_bit(exported: Exported, tmp_path: Path, name: str) -> None:
    weights, out = exported(name)
    state = load_model(weights).decoder.state_dict()
    stored = load_file(out / "model.safetensors")
    assert set(stored) >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(tensor, state[key.removeprefix("model.")]) for key, tensor in stored.items())
    if name in NATIVE:
        import_checkpoint(out, tmp_path / "back")
        back = load_model(tmp_path / "back").decoder
        assert all(torch.equal(tensor, state[key]) for key, tensor in back.state_dict().items())
        assert (back.config.rope_scaling, back.config.rope_theta) == (
            make(name).config.rope_scaling,
            make(name).config.rope_theta,
        )


def test_config_json_is_read_by_old_and_new_transformers(exported: Exported) -> None:
    config = json.loads((exported("dense")[1] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["dtype"] == config["torch_dtype"] == "float32" and "auto_map" not in config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 2, 3)
    config = json.loads((exported("layer")[1] / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@pytest.mark.parametrize(("stage", "ranks"), [(2, 1), (3, 1), (3, 2)])
def test_a_run_of_any_shape(tmp_path: Path, corpus: dict[str, Any], stage: int, ranks: int) -> None:
    run = write_run(tmp_path / "run", make("layer"), corpus, stage, ranks)
    lines = export(run, tmp_path / "out", shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "out" / file).stat().st_size < 110_000 for file in files[1:-1])
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in make("layer").parameters())
    tokens = random_ids(2, 40)
    with torch.no_grad():
        assert float((load(tmp_path / "out")(tokens).logits - logits_of(make("layer"), tokens)).abs().max()) < 1e-4
    card = (tmp_path / "out/README.md").read_text()
    for fact in ("| optimiser steps | 3 |", "| training tokens | 384 |", "| ZeRO stage |", "validation loss on code"):
        assert fact in card
    assert "| mean | 0.250 |" in card and f"| processes | {ranks} |" in card
    assert lines[0].startswith(f"read      {run}/checkpoints/step-00000003: pretrained, ")


def test_a_tuned_run(tmp_path: Path, corpus: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", make("layer-ensemble"), corpus)
    export(run, tmp_path / "out")
    tokens = random_ids(2, 40)
    with torch.no_grad():
        theirs = load(tmp_path / "out")(tokens).logits
    assert float((theirs - logits_of(make("layer-ensemble"), tokens)).abs().max()) < 1e-4
    assert "Its last 2 layers vote" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(("name", "kind"), [("layer-ensemble", "lora"), ("dense", "dora")])
def test_adapters_kept_apart(
    tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    tuned, block = make_tuned(make(name), kind)
    run, out = write_run(tmp_path / "run", tuned, corpus, adapter=block), tmp_path / "out"
    assert main([str(run), str(out), "--adapters", "separate"]) == 0
    printed = capsys.readouterr().out
    assert f"; {kind} adapter in {out}/adapter, for PEFT\n" in printed and "the same 64 tokens greedily" in printed
    assert {path.name for path in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base, tokens = load(out), random_ids(2, 40)
    plain = make(name)  # the ensemble, too
    with torch.no_grad():
        assert float((base(tokens).logits - logits_of(plain, tokens)).abs().max()) < 1e-4
        theirs = PeftModel.from_pretrained(base, str(out / "adapter")).eval()(input_ids=tokens).logits
    assert float((theirs - logits_of(tuned, tokens)).abs().max()) < 1e-4
    assert float((theirs - logits_of(plain, tokens)).abs().max()) > 0.01
    card = (out / "README.md").read_text()
    assert f"| tuning method | {kind}, separate |" in card
    flag = "" if name in NATIVE else ", trust_remote_code=True"
    usage = f'AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{flag})\nmodel = PeftModel.from_pretrained(model, '
    assert usage + '"THIS_FOLDER/adapter")' in card and "from peft import PeftModel\n" in card
    with pytest.raises(ValueError, match=r"out has separate adapters in adapter/, .* with --adapters merged, or gi"):
        import_checkpoint(out, tmp_path / "back")


def test_merged_adapters(tmp_path: Path, corpus: dict[str, Any]) -> None:
    tuned, block = make_tuned(make("layer-ensemble"), "dora")
    export(write_run(tmp_path / "run", tuned, corpus, adapter=block), tmp_path / "out")
    tokens = random_ids(2, 40)
    with torch.no_grad():
        assert float((load(tmp_path / "out")(tokens).logits - logits_of(tuned, tokens)).abs().max()) < 1e-4
    assert not (tmp_path / "out/adapter").exists()
    assert "| tuning method | dora, merged |" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda found: {name.replace("layers.1", "layers.9"): w for name, w in found.items()}, "PEFT cannot put the a"),
        (lambda found: {name: w * 1.01 for name, w in found.items()}, "the export's logits differ by"),
    ],
)
def test_an_adapter_that_is_not_ours_stays_to_be_looked_at(
    tmp_path: Path, corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch, spoil: Any, sentence: str
) -> None:
    tuned, block = make_tuned(make("dense"), "lora")
    write = adapter_files._write
    monkeypatch.setattr(adapter_files, "_write", lambda path, tensors: write(path, spoil(tensors)))
    with pytest.raises(ValueError, match=f"{sentence}.*; it is kept in .*out.tmp for inspection"):
        export(write_run(tmp_path / "run", tuned, corpus, adapter=block), tmp_path / "out", adapters="separate")
    assert (tmp_path / "out.tmp/adapter").is_dir() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["layer", "layer-ensemble"])
def test_a_run_without_adapters_has_none_to_keep_apart(
    tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = write_run(tmp_path / "run", make(name), corpus)
    with pytest.raises(SystemExit):
        main([str(run), str(tmp_path / "out"), "--adapters", "separate"])
    said = capsys.readouterr().err
    assert f"--adapters separate is for runs tuned with adapter.kind lora or dora, but {run} has no adapters" in said
    assert not list(tmp_path.glob("out*"))


def test_bf16_is_the_rounded_model(tmp_path: Path, exported: Exported) -> None:
    export(exported("layer")[0], tmp_path / "out", dtype="bf16")
    stored = load_file(tmp_path / "out/model.safetensors")
    state = load_model(exported("layer")[0]).decoder.state_dict()
    assert all(torch.equal(tensor, state[key.removeprefix("model.")].bfloat16()) for key, tensor in stored.items())
    assert load(tmp_path / "out").dtype == torch.bfloat16


FRESH = """
import importlib.util, pathlib, sys, torch
sys.path = [folder for folder in sys.path if not (pathlib.Path(folder) / "trainer").is_dir()]  # where it is installed
from transformers import AutoModelForCausalLM
assert not any(importlib.util.find_spec(name) for name in ("model", "convert", "trainer"))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)
torch.save(model(torch.arange(40)[None]).logits.detach(), sys.argv[2])
"""


def test_a_fresh_process_that_cannot_import_this_project(tmp_path: Path, exported: Exported) -> None:
    weights, out = exported("module-ensemble")
    shutil.copytree(out, tmp_path / "moved")
    (tmp_path / "script.py").write_text(FRESH)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "script.py", "moved", "logits.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = torch.load(tmp_path / "logits.pt")
    assert float((theirs - logits_of(load_model(weights).decoder, torch.arange(40)[None])).abs().max()) < 1e-4


def test_without_the_flag_nothing_of_an_export_runs(exported: Exported) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(exported("layer")[1], trust_remote_code=False)


def test_the_auto_classes_and_the_tokenizer(exported: Exported) -> None:
    out = exported("layer")[1]
    assert type(AutoModel.from_pretrained(out, trust_remote_code=True)).__name__ == "HopscotchModel"
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    text = "def f(x):\n    return  x  # </s> is text"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path, corpus: dict[str, Any]) -> None:
    run, mark = write_run(tmp_path / "run", make("layer"), corpus), tmp_path / "executed"
    saved = run / "checkpoints/step-00000003"
    torch.save({"module": {}, "extra": Payload(mark)}, saved / "deepspeed/mp_rank_00_model_states.pt")
    (saved / "manifest.json").unlink()
    manifest.write(saved, {"step": 3, "world_size": 1})
    with pytest.raises(ValueError, match=r"holds more than tensors and numbers \(posix\.mkdir\)"):
        export(run, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_torn_checkpoint(tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", make("layer"), corpus)
    states = run / "checkpoints/step-00000003/deepspeed/mp_rank_00_model_states.pt"
    states.write_bytes(states.read_bytes()[:-1])
    with pytest.raises(SystemExit):
        main([str(run), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "error: " in said and "holds no whole checkpoint; train until one is saved" in said
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_written_over(tmp_path: Path, exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    weights = exported("dense")[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "full", tmp_path / "full/mine.txt", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"already exists and is not an empty folder; nothing is overwritten"):
            export(weights, out)
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    for out in (tmp_path / "full/../other", Path(".")):
        with pytest.raises(ValueError, match=r"OUT must name a folder without '\.\.', got"):
            export(weights, out)
    (tmp_path / "empty").mkdir()
    assert main([str(weights), str(tmp_path / "empty")]) == 0
    assert "LlamaForCausalLM in fp32, 1 safetensors file\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(weights), str(tmp_path / "new"), "--shard-gb", "0"])
    assert "argument --shard-gb: must be a number above 0, at most 1e+12, got '0'" in capsys.readouterr().err


def test_what_differs_stays_to_be_looked_at(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save({name: tensor + 0.01 if "lm_head" in name else tensor for name, tensor in tensors.items()}, path, metadata)

    save = weights_folder.save_tensors
    monkeypatch.setattr(weights_folder, "save_tensors", spoil)
    with pytest.raises(ValueError, match=r"the export's logits differ by .*; it is kept in .*out.tmp for inspection"):
        export(exported("layer")[0], tmp_path / "out")
    assert (tmp_path / "out.tmp/config.json").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(weights_folder, "save_tensors", save)
    export(exported("layer")[0], tmp_path / "out")
    assert not (tmp_path / "out.tmp").exists()


def test_a_tokenizer_json_is_compared_with_transformers(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the class that it asks for builds rules of its own, the export asks for one that does not."""
    found = {}
    for name, kind in (("alike", "PreTrainedTokenizerFast"), ("other", "LlamaTokenizer")):
        folder = tmp_path / name
        folder.mkdir()
        write_tokenizer(folder)
        asked = json.loads((folder / "tokenizer_config.json").read_text())
        asked |= {"tokenizer_class": kind, "chat_template": "x"}
        (folder / "tokenizer_config.json").write_text(json.dumps(asked))
        found[name] = export(exported("layer")[0], tmp_path / f"{name}-hf", tokenizer=folder)[2]
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{name}-hf", trust_remote_code=False)
        ours, text = load_text_tokenizer(folder), "def f(self):\n    return  1  # naïve"
        assert theirs(text)["input_ids"] == ours.prefix + ours.encode(text) and theirs.chat_template == "x"
    assert found["alike"].endswith("; ids are transformers' on 1,000 texts")
    assert "asks for PreTrainedTokenizerFast now; before, " in found["other"]
    assert "asks for PreTrainedTokenizerFast now" in (tmp_path / "other-hf/README.md").read_text()
    monkeypatch.setattr("convert.hf_tokenizer._difference", lambda *_, **__: "other ids")
    with pytest.raises(
        ValueError, match=r"the export's tokenizer differs from the one in .*tokenizer.json: other ids; it "
    ):
        export(exported("layer")[0], tmp_path / "out", tokenizer=folder)
    assert not (tmp_path / "out").exists()
    lines = export(exported("layer")[0], tmp_path / "out", tokenizer=folder, compared=False)
    assert "compared  with nothing" in lines[1] and lines[2].endswith(f"copied from {folder}")


def test_an_export_that_nobody_has_compared_says_so(
    tmp_path: Path, exported: Exported, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, compared = exported("layer")
    monkeypatch.setattr("convert.hf_compare.compare", lambda *_: pytest.fail("compared all the same"))
    assert main([str(weights), str(tmp_path / "out"), "--no-compare"]) == 0
    assert "compared  with nothing, as requested" in capsys.readouterr().out
    assert "the export's logits were not checked" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (compared / "model.safetensors").read_bytes()


def test_a_copy_goes_elsewhere(tmp_path: Path, corpus: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, url = write_run(tmp_path / "run", make("layer"), corpus), f"file://{tmp_path}/away"
    with pytest.raises(SystemExit):
        main([str(path), str(tmp_path / "out"), "--no-compare", "--copy-to", "s33://bucket/out"])
    assert "error: --copy-to s33://bucket/out: the protocol 's33' is not known" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # told before anything is written
    assert main([str(path), str(tmp_path / "out"), "--no-compare", "--copy-to", url]) == 0
    assert f"copied to {url}, config.json last" in capsys.readouterr().out
    names = [sorted(str(p.relative_to(tmp_path / f)) for p in (tmp_path / f).rglob("*")) for f in ("out", "away")]
    assert names[0] == names[1] and "config.json" in names[0]


def test_a_full_disk(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    folder = str(exported("layer")[0])
    monkeypatch.setattr(weights_folder, "save_file", full)
    with pytest.raises(SystemExit):
        main([folder, str(tmp_path / "out")])
    assert "could not be written (No space left on device); free some space" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(tmp_path: Path, corpus: dict[str, Any]) -> None:
    sizes = {**SIZES, "vocab_size": VOCAB}
    choice = ModelConfig.model_validate({**sizes, "router": {"kind": "expert_choice", "density": 0.5}})
    write_weights(decoder(choice), tmp_path / "choice", Path(corpus["dir"]), {})
    with pytest.raises(
        ValueError, match=r"router.kind expert_choice picks tokens by looking at later ones, so .* is not exported"
    ):
        export(tmp_path / "choice", tmp_path / "out")
    small = ModelConfig.model_validate({**sizes, "vocab_size": VOCAB - 1})
    write_weights(decoder(small), tmp_path / "small", Path(corpus["dir"]), {})
    with pytest.raises(
        ValueError,
        match=r"has 400 pieces, but the model's vocabulary is 399: there is no embedding for .*, whose id is 399; give",
    ):
        export(tmp_path / "small", tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"has no tokenizer: it holds neither tokenizer.json nor tokenizer.model; copy"
    ):
        export(tmp_path / "small", tmp_path / "out", tokenizer=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_have_the_mode_that_the_umask_leaves(exported: Exported, tmp_path: Path, umask: int) -> None:
    weights = exported("layer")[0]
    before = os.umask(umask)
    try:
        export(weights, tmp_path / "out", shard_bytes=100_000)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(modes) > 8 and set(modes.values()) == {0o666 & ~umask}, modes
