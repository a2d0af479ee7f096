"""What the doctor says of what a run reads: shards, tokenizer, base, examples, questions and settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from data.prepare.run import prepare
from launch.configs import load_either
from launch.doctor import inputs
from launch.doctor.findings import Finding, run
from model.config import ModelConfig
from model.decoder import Decoder
from tests.launch.doctor.helpers import only
from tests.launching import ROOT
from trainer.checkpoints.weights_folder import write_weights
from trainer.config import PretrainConfig
from tune.config import TuneFile


def test_shards_are_compared_with_tokenizer_and_model(tiny: dict[str, Any], tmp_path: Path) -> None:
    def finding() -> Finding:
        return only(run({"data": lambda: inputs.shards(PretrainConfig.model_validate(tiny))}))

    assert finding().level == "ok"
    tiny["model"]["vocab_size"] = tiny["data"]["tokenizer"]["vocab_size"] = 500
    assert "vocabulary of 400, but data.tokenizer.vocab_size is 500" in finding().found
    tiny["model"]["vocab_size"] = tiny["data"]["tokenizer"]["vocab_size"] = 400
    tiny["data"]["validation"][0]["name"] = "absent"
    assert "absent/manifest.json does not exist" in finding().found
    tiny["data"]["dir"] = str(tmp_path / "nowhere")
    assert finding().level == "error" and "has no tokenizer: it holds neither" in finding().found


def test_text_changed_since_its_preparation_is_a_warning(tiny: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("one line\n" * 200)
    data = tiny["data"]
    tokenizer = Path(data["dir"]) / "tokenizer.model"
    data |= {"dir": str(tmp_path / "own"), "sources": [{"name": "own", "files": [str(own)]}], "validation": []}
    Path(data["dir"]).mkdir()
    shutil.copy(tokenizer, data["dir"])
    config = PretrainConfig.model_validate(tiny)
    prepare(config.data, workers=1)
    own.write_text("one line\n" * 201)
    ok, changed = run({"data": lambda: inputs.shards(config)})
    assert (ok.level, changed.level) == ("ok", "warning")
    assert changed.found.endswith("changed since: 1 source file (own.txt: 1,800 -> 1,809 bytes)")
    assert changed.remedy.startswith(f"remove {tmp_path / 'own/train/own'} and prepare it again; ")


def test_stage_two_needs_its_base_its_tokenizer_and_its_files(
    tiny: dict[str, Any], corpus: dict[str, Any], tmp_path: Path, examined: Callable[..., tuple[int, str]]
) -> None:
    base, examples = tmp_path / "base", tmp_path / "examples.jsonl"
    blocks = yaml.safe_load((ROOT / "configs/tune_lora.yaml").read_text())
    source = {"name": "some", "files": [str(examples)]}
    blocks["base"]["path"] = str(base)
    blocks["data"] = {"sequence_tokens": 64, "sources": [source]}
    blocks["train"]["run_dir"] = str(tmp_path / "tuned")
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(blocks))
    status, out = examined(str(path))
    assert status == 1 and "holds no config.yaml with a model block" in out
    write_weights(Decoder(ModelConfig.model_validate(tiny["model"])), base, Path(corpus["dir"]), {"source": "test"})
    status, out = examined(str(path))
    assert status == 1 and f"no file matches '{examples}'" in out
    examples.write_text('{"prompt": "a", "response": "b"}\n')
    status, out = examined(str(path))
    assert status == 0 and "1 files" in out and "trained; about" in out, out
    tuned = tmp_path / "other"
    tuned.mkdir()
    (tuned / "config.yaml").write_text(f"base: {{path: x}}\n{(base / 'config.yaml').read_text()}")
    assert "is a stage-two run, whose weights apply on top" in examined(str(path), f"base.path={tuned}")[1]
    config = load_either(path)
    assert isinstance(config, TuneFile)
    small = ModelConfig.model_validate({**tiny["model"], "vocab_size": 300})
    finding = only(run({"data": lambda: inputs.examples(config.model_copy(update={"model": small}))}))
    assert finding.level == "error" and "has 400 pieces, but the model's vocabulary is 300" in finding.found


def test_settings_that_no_run_starts_with_are_errors(tiny: dict[str, Any]) -> None:
    def finding() -> Finding:
        return only(run({"settings": lambda: inputs.settings(PretrainConfig.model_validate(tiny))}))

    assert finding().level == "ok"
    tiny["train"]["schedule"] = {"warmup_steps": 99}
    late = finding()
    assert late.level == "error" and "warmup_steps (99) must not exceed train.steps (4)" in late.found
    tiny["train"]["schedule"] = {}
    tiny["init"] = {"path": "nowhere"}
    assert finding().found == "there is no folder nowhere"
    (Path(tiny["train"]["run_dir"]) / "checkpoints/step-00000004").mkdir(parents=True)
    assert finding().level == "ok"  # goes on from its own


def test_files_of_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"context": "a", "answer": "b"}\n' * 2)
    files, named = run({"tasks": lambda: inputs.tasks([str(path), "piqa"])})
    assert (files.level, files.found) == ("ok", "1 files with 2 questions")
    assert named.found == "lm-evaluation-harness's piqa are loaded when the run starts"
    path.write_text('{"context": "a"}\n')
    assert "own.jsonl, line 1 has the fields context" in only(run({"tasks": lambda: inputs.tasks([str(path)])})).found
    assert run({"tasks": lambda: inputs.tasks([])}) == []
