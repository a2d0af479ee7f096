"""What the comparison lets pass, and what not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.hf_compare import Reference, compare, refer
from model.agreement import Decisions
from tune.load import load_model

Exported = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def reference(exported: Exported) -> Reference:
    return refer(load_model(exported("layer")[0]).decoder)


def test_ties(exported: Exported, reference: Reference) -> None:
    out = exported("layer")[1]
    assert compare(reference, out).endswith("on 8 of 8 rows of 32 random tokens; the same 64 tokens greedily")
    parted = reference.continued.clone()
    parted[0, 20:] += 1
    place = 20 - reference.prompt.shape[1]
    other = reference._replace(continued=parted, gaps=reference.gaps + 1)
    with pytest.raises(ValueError, match=r"greedy continuation differs from its token \d+ of 64 on; it is kept in"):
        # What follows the parting is another text, where routers decide otherwise: only before it do they count.
        compare(other, out)
    tie = other._replace(gaps=reference.gaps * 0)
    assert compare(tie, out).endswith(f"the same {place} tokens greedily, then a tie of two token logits")
    tipped = tip(reference.continued_decisions, 0, 0, 3)
    said = compare(other._replace(continued_decisions=tipped), out)
    assert said.endswith(f"the same {place} tokens greedily, then a tie of two router logits")
    with pytest.raises(ValueError, match=r"the export routes tokens differently: 1 of \d+ .*; it is kept in"):
        compare(other._replace(continued_decisions=tipped._replace(ties=tipped.ties & False)), out)


def tip(decisions: Decisions, site: int, row: int | slice, token: int) -> Decisions:
    """``decisions`` of which one came out the other way, by rounding."""
    executed, ties = decisions.executed.clone(), decisions.ties.clone()
    executed[site, row, token] ^= True
    ties[site, row, token] = True
    return Decisions(executed, ties)


def test_rows_in_which_a_router_tipped_over_are_left_out_but_not_all(exported: Exported, reference: Reference) -> None:
    logits = reference.logits.clone()
    logits[2] += 1
    decisions = tip(reference.decisions, 1, 2, 5)
    assert "on 7 of 8 rows" in compare(reference._replace(decisions=decisions, logits=logits), exported("layer")[1])
    decisions = tip(reference.decisions, 1, slice(None), 5)
    with pytest.raises(ValueError, match=r"logits differ by inf, .* on 0 of 8 rows; it is kept in"):
        compare(reference._replace(decisions=decisions), exported("layer")[1])


def test_an_export_that_routes_otherwise_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Its thresholds are a little off: a few tokens run other layers, and most rows are as they were."""
    decoder = load_model(exported("layer")[0]).decoder
    with torch.no_grad():
        decoder.thresholds = decoder(torch.arange(32)[None]).routing.margins.flatten(1).median(dim=1).values
    reference = refer(decoder)
    out = Path(shutil.copytree(exported("layer")[1], tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    thresholds = decoder.thresholds.tolist()
    (out / "config.json").write_text(json.dumps({**config, "router_thresholds": thresholds}))
    assert "on 8 of 8 rows" in compare(reference, out)
    (out / "config.json").write_text(json.dumps({**config, "router_thresholds": [t + 0.01 for t in thresholds]}))
    with pytest.raises(ValueError, match=r"routing decisions differ by more than rounding, at routed sites"):
        compare(reference, out)


def test_what_transformers_cannot_load(exported: Exported, reference: Reference, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported("layer")[1], tmp_path / "out"))
    weights = load_file(out / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "layers.1.router" not in name}, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"other weights in the export \(missing keys \['model.layers.1.router.weight"):
        compare(reference, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "model_type": "none", "auto_map": {}}))
    with pytest.raises(ValueError, match=r"transformers cannot load the export \(.*; it is kept in"):
        compare(reference, out)
    assert torch.equal(
        weights["lm_head.weight"], load_file(exported("layer")[1] / "model.safetensors")["lm_head.weight"]
    )
