"""A config of stage two that contradicts itself, its base or its examples is refused in one sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.tokenization import load_text_tokenizer
from settings import user_errors
from settings.load import _apply_override
from tune.base import load_base
from tune.batches import TuningData
from tune.config import TuneFile
from tune.resolve import load_file, resolve

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no base": (["base.path=nowhere"], "there is no folder nowhere; give base.path"),
    "k too large": (["ensemble.layers=9"], "ensemble.layers (9) must not exceed the base's 4 layers; lower it"),
    "nothing trains": (
        ["adapter.kind=none", "ensemble=null"],
        "adapter.kind none without an ensemble and with frozen routers trains nothing; add an ensemble block",
    ),
    "all late layers": (
        ["adapter.kind=full", "adapter.layers=late"],
        "adapter.layers late applies to lora and dora, but adapter.kind is full; leave adapter.layers out",
    ),
    "no early layers": (["adapter.layers=early", "ensemble.layers=4"], "adapter.layers early means the layers before"),
    "unknown target": (["adapter.targets=[lm_head]"], "adapter.targets[0]: input should be 'q_proj', 'k_proj'"),
    "dropout and recomputation": (
        ["adapter.dropout=0.1", "train.activation_checkpointing=true"],
        "adapter.dropout (0.1) must be 0 with train.activation_checkpointing",
    ),
    "another model": (
        ["model={vocab_size: 400, layers: 6, width: 32, heads: 2, kv_heads: 1, ffn_width: 48}"],
        "has a model that differs from this config's model block (model.layers 4 there, 6 here",
    ),
    "window beyond the base": (
        ["data.sequence_tokens=512"],
        "data.sequence_tokens (512) must not exceed model.max_positions (128)",
    ),
    "examples beyond the window": (["data.sequence_tokens=8"], "set data.too_long: leave_out"),
    "unknown key": (["ensemble.layer=3"], "unknown key 'ensemble.layer'; did you mean 'ensemble.layers'?"),
    "wrong choices": (["data.validation.0.choices=[]", "data.tests=[]"], "unknown key 'data.tests'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, tuning: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy.deepcopy(tuning)
    overrides, sentence = MISTAKES[mistake]
    for override in overrides:
        if ".0." not in override:
            _apply_override(config, override)
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended, user_errors():
        file = load_file(path)
        resolved = resolve(file, load_base(file.base.path))
        TuningData(resolved.data, load_text_tokenizer(str(resolved.data.tokenizer)))
    told = str(ended.value.code) + capsys.readouterr().err
    assert sentence in told and "\n" not in told.strip()


@pytest.mark.parametrize("place", ["", "/tuned", "/checkpoints/step-00000004"])
def test_a_run_does_not_write_into_its_base(place: str, tuning: dict[str, Any], base_run: str) -> None:
    config = copy.deepcopy(tuning)
    config["train"]["run_dir"] = base_run + place
    with pytest.raises(ValueError, match="are the same, or one contains the other; give the tuned run a folder"):
        resolve(TuneFile.model_validate(config), load_base(base_run))
