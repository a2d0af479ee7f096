"""One way in for runs of both stages, their checkpoints and folders of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.facts import facts_of
from model.decoder import Decoder
from tests.convert.exports import make, write_run
from tune.load import load_model

Exported = Callable[[str], tuple[Path, Path]]


def same(one: Decoder, other: Decoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("name", ["layer", "layer-ensemble"])
def test_runs_and_checkpoints(tmp_path: Path, corpus: dict[str, Any], name: str) -> None:
    run = write_run(tmp_path / "run", make(name), corpus)
    checkpoint = run / "checkpoints/step-00000003"
    for path in (run, checkpoint):
        loaded = load_model(path)
        assert same(loaded.decoder, make(name)) and not loaded.decoder.training
        assert loaded.tokenizer_folder == Path(corpus["dir"]) and loaded.source == checkpoint
        facts = json.loads(json.dumps(facts_of(loaded)))
        assert facts["kind"] == ("tuned" if "ensemble" in name else "pretrained") and facts["step"] == 3
        assert facts["tokens"] == 384  # of step 3, not of the later ones
        assert facts["validation_losses"] == {"code": 5.25} and facts["densities"] == {"mean": 0.25}
        assert (facts["world_size"], facts["zero_stage"], facts["precision"]) == (1, 2, "fp32")
        assert facts["target_density"] == 0.5
    if name == "layer-ensemble":
        assert facts["base"] == "base" and facts["adapter"] == "full"


def test_a_checkpoint_alone_has_no_metrics(tmp_path: Path, corpus: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", make("layer"), corpus)
    alone = (run / "checkpoints/step-00000003").rename(tmp_path / "alone")
    facts = facts_of(load_model(alone))
    assert facts["step"] == 3 and facts["tokens"] is None and facts["validation_losses"] == {}


def test_a_folder_of_weights(exported: Exported) -> None:
    weights, _ = exported("module-ensemble")
    loaded = load_model(weights)
    assert same(loaded.decoder, make("module-ensemble"))
    assert loaded.tokenizer_folder == loaded.source == weights
    assert facts_of(loaded) == {"kind": "weights", "source": "a test"}


def test_what_holds_no_model(tmp_path: Path, exported: Exported) -> None:
    with pytest.raises(ValueError, match=r"is a Hugging Face folder, not a run; import it with: python -m convert.fro"):
        load_model(exported("layer")[1])
    with pytest.raises(ValueError, match=r"there is no folder .*/none; give a run folder"):
        load_model(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("[: no YAML")
    with pytest.raises(ValueError, match=r"is neither a run folder nor a whole checkpoint"):
        load_model(tmp_path)
