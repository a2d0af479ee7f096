"""The merged model as a folder of weights, and merging that goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.config import EnsembleConfig
from model.decoder import Decoder
from settings import load, to_yaml
from tests.model import tiny
from tests.tune.test_adapters import tuned
from trainer.checkpoints import manifest
from trainer.distributed import ALONE
from tune.config import TuneConfig
from tune.load import load_model
from tune.merge import ROWS, main, merge_checked

STEP = 7


@pytest.fixture
def checkpoint(tmp_path: Path, corpus: dict[str, Any]) -> Path:
    """A checkpoint of a LoRA run with an ensemble, as stage 0 in fp32 writes it."""
    model = tiny.config()
    config = {
        "base": {"path": "runs/base"},
        "model": model.model_dump(mode="json"),
        "ensemble": EnsembleConfig(layers=2, final_weight=0.6).model_dump(mode="json"),
        "data": {
            "sequence_tokens": 32,
            "sources": [{"name": "none", "files": ["none.jsonl"]}],
            "tokenizer": corpus["dir"],
        },
        "train": {"steps": 9, "global_batch_samples": 1, "micro_batch_samples": 1, "precision": "fp32"},
        "deepspeed": {"zero_stage": 0},
    }
    folder = tmp_path / "step-00000007"
    (folder / "deepspeed").mkdir(parents=True)
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(config))
    (folder / "config.yaml").write_text(to_yaml(load(tmp_path / "written.yaml", [], TuneConfig)))
    write(tuned("lora"), folder)
    return folder


def write(decoder: Decoder, folder: Path) -> None:
    torch.save({"module": decoder.state_dict()}, folder / "deepspeed/mp_rank_00_model_states.pt")
    torch.save({}, folder / "trainer.pt")
    (folder / manifest.NAME).unlink(missing_ok=True)
    manifest.write(folder, {"step": STEP, "world_size": 1})


@torch.no_grad()
def test_the_folder_holds_the_tuned_model(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert f"rows\nwrote {tmp_path / 'out'}" in told and "logits with adapters and merged differ by at most" in told
    merged, tokens = load_model(tmp_path / "out").decoder, tiny.random_tokens()
    tiny.assert_close(merged(tokens).logits, tuned("lora").eval()(tokens).logits)
    assert merged.ensemble is not None and merged.ensemble.config.final_weight == 0.6
    facts = manifest.read(tmp_path / "out", ALONE)
    assert facts["source"] == f"{checkpoint}, runs/base tuned for 7 steps"
    assert (tmp_path / "out/tokenizer.model").is_file()


def test_nothing_is_written_over(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(checkpoint), str(tmp_path)])
    assert (
        "error: " in (told := capsys.readouterr().err)
        and "already exists and is not an empty folder; nothing is overwritten" in told
    )


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none"), str(tmp_path / "out")])
    assert "error: there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("router", ["learned", "dense"])
def test_every_row_is_compared(router: str) -> None:
    difference, span, rows = merge_checked(tuned("dora", router).eval())
    assert 0 < difference < 1e-4 and span > 0 and rows == ROWS


def test_logits_of_a_wide_range_may_differ_by_as_large_a_share_of_it() -> None:
    """A head times 20,000 moves logits and their rounding alike."""
    decoder = tuned("dora", "dense").eval()
    with torch.no_grad():
        decoder.lm_head.weight.mul_(2e4)
    difference, span, _ = merge_checked(decoder)
    assert difference > 1e-3 and difference < 1e-5 * span


def losing(decoder: Decoder) -> Decoder:
    """A huge update that the adapter's other half takes back: as sums of weights nothing of the weight is left."""
    for layer in decoder.layers:
        a, b = (getattr(layer.mlp.down_proj, name)["default"].weight.data for name in ("lora_A", "lora_B"))
        a[4:], b[:, :4], b[:, 4:] = a[:4], 1e6 * torch.ones_like(b[:, :4]), -1e6 * torch.ones_like(b[:, 4:])
        a.mul_(1 + 1e-5 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0)))
    return decoder.eval()


def test_a_merge_that_loses_too_much_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"must be those of the model with adapters to 0.0001 of their range \("):
        merge_checked(losing(tuned("lora", "dense", rank=8)))
    write(losing(tuned("lora", rank=8)), checkpoint)
    with pytest.raises(SystemExit):
        main([str(checkpoint), str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert "routes tokens differently: " in told and "the adapters' weights are too large to be added in fp32" in told
    assert not (tmp_path / "out").exists()
