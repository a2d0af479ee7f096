"""What real engines save, at any ZeRO stage and number of ranks, is exported as the model that they held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.to_hf import export
from tests.conftest import VOCAB
from tests.convert.test_to_hf import load
from tests.once import once
from tests.trainer.checkpoints.saved_runs import CASES, save_runs
from tune.load import load_model

ONE_RANK = {name: overrides for name, overrides in CASES.items() if name.startswith("fp32")}


@pytest.fixture(scope="module")
def one_rank_runs(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> Path:
    """The same as ``two_rank_runs``, of one rank and in fp32."""
    return once(tmp_path_factory, "one-rank-runs", lambda at: save_runs(at, corpus, ONE_RANK, ranks=1)) / "out"


@pytest.mark.parametrize(
    ("fixture", "ranks", "name"),
    [("one_rank_runs", 1, name) for name in ONE_RANK] + [("two_rank_runs", 2, name) for name in CASES],
)
@torch.no_grad()
def test_logits_are_those_of_the_engines_weights(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str, ranks: int, name: str
) -> None:
    run: Path = request.getfixturevalue(fixture) / name
    said = export(run, tmp_path / "out")
    assert "the same 64 tokens greedily" in said[1]
    decoder = load_model(run).decoder
    masters = torch.load(run / "masters.pt")  # what the engine itself called its weights
    decoder.load_state_dict(masters, strict=not decoder.config.tied_head)
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = decoder(tokens).logits
    assert ours is not None
    assert float((load(tmp_path / "out")(tokens).logits - ours).abs().max()) < 1e-4
    card = (tmp_path / "out/README.md").read_text()
    assert f"| processes | {ranks} |" in card
    (manifest,) = run.glob("checkpoints/*/manifest.json")
    commit = json.loads(manifest.read_text())["commit"]
    assert (f"| commit that trained it | {commit} |" in card) == (commit is not None)
