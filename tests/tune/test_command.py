"""``python -m tune.train`` and the commands around it: what they say and leave, from an import to a merge."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from tests.conftest import VOCAB
from tests.launching import run
from tests.logged import figures_of
from trainer.exit_status import EXIT_MISTAKE
from tune.load import load_model


def test_the_command_says_what_it_trains_and_leaves_pictures(
    tuning: dict[str, Any], tmp_path: Path, base_run: str
) -> None:
    config = copy.deepcopy(tuning)
    config["train"] |= {"run_dir": str(tmp_path / "run"), "steps": 2, "log": {"every_steps": 1, "peak_tflops": 1.0}}
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(config))
    done = run("tune.train", str(path), processes=2, launcher="deepspeed")
    assert done.returncode == 0, done.stdout[-3000:]
    figures = figures_of(tmp_path / "run")[0]
    share = figures["parameters/trained"] / figures["parameters/total"]
    assert (
        f"{figures['parameters/trained']:,} of {figures['parameters/total']:,} parameters ({share:.2%})" in done.stdout
    )
    for text in ("learned routers", "the last 2 layers", "oracle", "test parity after 2 steps", "adapter saved in"):
        assert text in done.stdout, text
    assert "Traceback" not in done.stdout and "Warning" not in done.stdout
    assert (tmp_path / "run/vote-test-parity.png").stat().st_size > 10_000

    # The saved config says everything: it runs again as it is, to the same losses.
    again = run("tune.train", str(tmp_path / "run/config.yaml"), f"train.run_dir={tmp_path}/again", processes=2)
    assert again.returncode == 0, again.stdout[-3000:]
    assert figures_of(tmp_path / "again") == figures_of(tmp_path / "run")


def test_the_command_ends_with_one_sentence_and_a_mistakes_status(tuning: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(tuning))
    done = run("tune.train", str(path), "ensemble.layers=9", f"train.run_dir={tmp_path}/none")
    assert done.returncode == EXIT_MISTAKE and "Traceback" not in done.stdout
    assert done.stdout.strip().splitlines()[-1].endswith("lower it to at most 4")
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_from_hugging_face_is_imported_tuned_and_merged(
    tuning: dict[str, Any], base_run: str, tmp_path: Path
) -> None:
    """Llama weights of transformers, the base's tokenizer: the whole way by commands."""
    corpus_folder = Path(yaml.safe_load((Path(base_run) / "config.yaml").read_text())["data"]["dir"])
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(made).save_pretrained(tmp_path / "hf")
    shutil.copy(corpus_folder / "tokenizer.model", tmp_path / "hf")
    done = run("convert.from_hf", str(tmp_path / "hf"), str(tmp_path / "imported"))
    assert done.returncode == 0, done.stdout[-2000:]

    config = copy.deepcopy(tuning)
    config["base"]["path"] = str(tmp_path / "imported")
    config["train"] |= {"run_dir": str(tmp_path / "run"), "steps": 2}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config))
    done = run("tune.train", str(tmp_path / "tune.yaml"))
    assert done.returncode == 0, done.stdout[-2000:]
    assert "routers   none" in done.stdout and (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    done = run("tune.merge", str(tmp_path / "run"), str(tmp_path / "merged"))
    assert done.returncode == 0, done.stdout[-2000:]

    # What was merged is what was trained, and does not go under a second ensemble.
    merged, tuned = load_model(tmp_path / "merged").decoder, load_model(tmp_path / "run").decoder
    tokens = torch.arange(40)[None] % VOCAB
    with torch.no_grad():
        assert torch.equal(merged(tokens).logits, tuned(tokens).logits)
    again = run(
        "tune.train", str(tmp_path / "tune.yaml"), f"base.path={tmp_path}/merged", f"train.run_dir={tmp_path}/2"
    )
    assert again.returncode == EXIT_MISTAKE and "was already tuned" in again.stdout and "Traceback" not in again.stdout
