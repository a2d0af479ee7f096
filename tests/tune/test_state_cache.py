"""Kept states of frozen layers: the same training with them and without, what is shared, what is refused."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.config import EnsembleConfig
from model.decoder import Decoder
from settings import load
from tests.launching import run
from tests.model import tiny
from trainer.checkpoints.weights_folder import write_weights
from trainer.config import PretrainConfig
from trainer.log import logger_of_run
from tune.adapters import prepare
from tune.base import load_base
from tune.config import AdapterConfig, TuneFile
from tune.resolve import resolve
from tune.state_cache import StateCache

METHODS = {"none": 3, "late": 1}
"""What is trained, and how many of three layers are frozen."""


def built(method: str, layers: int = 2) -> Decoder:
    """A dense decoder, ready to tune."""
    decoder = tiny.decoder(tiny.config("dense"))
    decoder.add_ensemble(EnsembleConfig(layers=layers, final_weight=0.5))
    adapter = AdapterConfig(kind="none") if method == "none" else AdapterConfig(kind="lora", layers="late", rank=3)
    prepare(decoder, adapter, "frozen", 0)
    return decoder


def losses(decoder: Decoder, steps: int = 4) -> list[float]:
    """Of a few steps on two batches in turn, packed documents in them."""
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=1e-2)
    documents, positions = tiny.documents_of(20, 13)
    found = []
    for step in range(steps):
        tokens, targets = tiny.random_tokens(seed=step % 2), tiny.random_targets(seed=step % 2)
        out = decoder(tokens, targets, documents=documents, positions=positions)
        assert out.loss is not None
        out.loss.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(out.loss.loss.detach()))
    return found


@pytest.mark.parametrize("method", ["none", "late"])
def test_training_is_the_same_and_states_are_computed_once(method: str, tmp_path: Path) -> None:
    expected = losses(built(method))
    for again in range(2):
        decoder = built(method)
        decoder.frozen = kept = StateCache(tmp_path, "base", METHODS[method])
        assert losses(decoder) == pytest.approx(expected, rel=1e-6)
        assert (kept.computed, kept.read) == ((0, 12) if again else (6, 6))
    assert expected[2] < expected[0]


def test_another_base_method_or_dtype_shares_nothing(tmp_path: Path) -> None:
    def computed(fingerprint: str, method: str, dtype: torch.dtype = torch.float32) -> int:
        decoder = built(method).to(dtype)
        decoder.frozen = kept = StateCache(tmp_path, fingerprint, METHODS[method])
        decoder(tiny.random_tokens())
        return kept.computed

    assert [computed("one", "none") for _ in range(2)] == [3, 0]
    assert computed("other", "none") == computed("one", "late") == computed("one", "none", torch.bfloat16) == 3


def test_documents_and_positions_are_part_of_a_window(tmp_path: Path) -> None:
    decoder = built("none")
    plain = copy.deepcopy(decoder)
    decoder.frozen = kept = StateCache(tmp_path, "base", METHODS["none"])
    for lengths in ((20, 13), (13, 20)):
        documents, positions = tiny.documents_of(*lengths)
        for places in (None, positions):
            both = [model(tiny.random_tokens(), documents=documents, positions=places) for model in (decoder, plain)]
            assert torch.equal(both[0].logits, both[1].logits)
    assert (kept.computed, kept.read) == (12, 0)


def test_generation_asks_the_layers(tmp_path: Path) -> None:
    from model.cache import KVCache

    decoder = built("none").eval()
    decoder.frozen = kept = StateCache(tmp_path, "base", METHODS["none"])
    cache = KVCache(decoder.config, 3, tiny.LENGTH, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        tiny.assert_close(decoder(tiny.random_tokens(), cache=cache).logits, decoder(tiny.random_tokens()).logits)
    assert kept.computed == 3


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = losses(built("none"))
    decoder = built("none")
    decoder.frozen = kept = StateCache(tmp_path, "base", METHODS["none"])
    tries = []

    def full(*_: object) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(logger_of_run(), "propagate", True)
    assert losses(decoder) == pytest.approx(expected, rel=1e-6)
    assert (kept.computed, kept.read, len(tries)) == (12, 0, 1)
    assert f"base.cache_states {tmp_path / 'base'} cannot be written (No space left on device)" in caplog.text
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    decoder = built("none")
    decoder.frozen = StateCache(tmp_path, "base", METHODS["none"])
    decoder(tiny.random_tokens())
    broken = next(tmp_path.rglob("*.safetensors"))
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{broken.name} does not hold a window's states; remove it"):
        decoder(tiny.random_tokens())
    broken.unlink()
    decoder(tiny.random_tokens())
    assert broken.is_file()


@pytest.mark.parametrize("method", ["none", "late"])
def test_no_backward_pass_runs_below_what_is_trained(method: str) -> None:
    decoder, learning = built(method), []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _, __, out: learning.append(out[0].requires_grad))
    losses(decoder, steps=1)
    assert learning == {"none": [False] * 3, "late": [False, True, True]}[method]


@pytest.fixture(scope="module")
def dense(base_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of weights of a dense decoder, with the routed base's sizes and tokenizer."""
    config = load(Path(base_run) / "config.yaml", ["model.router=null"], PretrainConfig)
    folder = tmp_path_factory.mktemp("dense") / "base"
    write_weights(tiny.decoder(config.model), folder, Path(config.data.dir), {"source": "a test"})
    return str(folder)


def test_the_command_keeps_states_for_the_runs_after_it(dense: str, tuning: dict[str, Any], tmp_path: Path) -> None:
    """The second run, on one rank, reads what two have written."""
    kept, told, written = tmp_path / "states", [], []
    config = copy.deepcopy(tuning) | {"base": {"path": dense}, "adapter": {"kind": "lora", "layers": "late"}}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config))
    for name, where, ranks in (("without", None, 1), ("first", kept, 2), ("second", kept, 1)):
        more = [f"train.run_dir={tmp_path / name}", *([] if where is None else [f"base.cache_states={where}"])]
        done = run("tune.train", str(tmp_path / "tune.yaml"), *more, processes=ranks)
        assert done.returncode == 0, done.stdout[-3000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        told.append([json.loads(line)["train/loss"] for line in lines if "train/loss" in line])
        files = {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")}
        assert (len(files) > 10) == (where is not None)
        written.append(files)
    assert told[1] == pytest.approx(told[0], rel=2e-5) and told[2] == pytest.approx(told[0], rel=2e-5)
    assert written[1] == written[2]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"adapter": {"kind": "lora"}}, "adapter.kind lora with adapter.layers all trains the first one"),
        ({"adapter": {"kind": "full"}}, "adapter.kind full with adapter.layers all trains the first one"),
        ({"adapter": {"layers": "early"}}, "adapter.kind lora with adapter.layers early trains the first one"),
        ({"adapter": {"kind": "none"}, "deepspeed": {"zero_stage": 3}}, "needs deepspeed.zero_stage 0, 1 or 2"),
        (
            {"adapter": {"kind": "none"}, "deepspeed": {"sequence_parallel": 2}},
            r"caches the states of whole windows, but deepspeed.sequence_parallel \(2\) divides each among ranks",
        ),
        ({"adapter": {"layers": "late"}, "ensemble": None}, "adapter.layers late means the ensemble's layers"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    overrides: dict[str, Any], sentence: str, dense: str, tuning: dict[str, Any], tmp_path: Path
) -> None:
    config = copy.deepcopy(tuning) | {"base": {"path": dense, "cache_states": str(tmp_path)}} | overrides
    with pytest.raises(ValueError, match=sentence):
        resolve(TuneFile.model_validate(config), load_base(dense))


def test_a_routed_base_is_refused(tuning: dict[str, Any], base_run: str, tmp_path: Path) -> None:
    config = copy.deepcopy(tuning) | {"adapter": {"kind": "none"}}
    config["base"] |= {"cache_states": str(tmp_path)}
    with pytest.raises(ValueError, match=r"base\.cache_states needs a dense base, but this one has routers"):
        resolve(TuneFile.model_validate(config), load_base(base_run))
