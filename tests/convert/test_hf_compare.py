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
    with pytest.raises(ValueError, match=r"greedy continuation differs from its token \d+ of 64 on; it stays in"):
        # What follows the parting is another text, where routers decide otherwise: only before it do they count.
        executed = reference.continued_executed
        compare(other._replace(continued_executed=executed), out)
    tie = other._replace(gaps=reference.gaps * 0)
    assert compare(tie, out).endswith(f"the same {place} tokens greedily, then a tie of two token logits")
    tipped = reference.continued_executed.clone()
    tipped[0, 0, 3] ^= True
    said = compare(other._replace(continued_executed=tipped), out)
    assert said.endswith(f"the same {place} tokens greedily, then a tie of two router logits")


def test_rows_in_which_a_router_tipped_over_are_left_out_but_not_all(exported: Exported, reference: Reference) -> None:
    executed, logits = reference.executed.clone(), reference.logits.clone()
    executed[1, 2, 5] ^= True
    logits[2] += 1
    assert "on 7 of 8 rows" in compare(reference._replace(executed=executed, logits=logits), exported("layer")[1])
    executed[1, :, 5] = ~reference.executed[1, :, 5]
    with pytest.raises(ValueError, match=r"logits differ by inf, .* on 0 of 8 rows; it stays in"):
        compare(reference._replace(executed=executed), exported("layer")[1])


def test_what_transformers_cannot_load(exported: Exported, reference: Reference, tmp_path: Path) -> None:
    out = Path(shutil.copytree(exported("layer")[1], tmp_path / "out"))
    weights = load_file(out / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "layers.1.router" not in name}, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"other weights in the export \(missing keys \['model.layers.1.router.weight"):
        compare(reference, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "model_type": "none", "auto_map": {}}))
    with pytest.raises(ValueError, match=r"transformers cannot load the export \(.*; it stays in"):
        compare(reference, out)
    assert torch.equal(
        weights["lm_head.weight"], load_file(exported("layer")[1] / "model.safetensors")["lm_head.weight"]
    )
