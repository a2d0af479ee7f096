"""Tiny models with everything that an export must carry, written by hand: no training, no ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import EnsembleConfig, ModelConfig
from model.decoder import Decoder
from settings import to_yaml
from tests.conftest import VOCAB
from tests.model.tiny import SIZES, VARIANTS, decoder
from trainer.checkpoints import manifest
from trainer.config import PretrainConfig
from tune.adapters import part_of, prepare
from tune.config import AdapterConfig, TuneConfig

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_positions": 32}
MODULE = {"kind": "learned", "density": 0.5, "granularity": "module", "input": "raw", "always_on_first": 1}
LEARNED = {"kind": "learned", "density": 0.5}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "dense": ({"rope_theta": 5000.0}, None),
    "dense-tied-llama3": ({**VARIANTS["mqa-tied-wide-head"], "rope_scaling": LLAMA3}, None),
    "dense-qk-norm": (VARIANTS["mha-qk-norm"], None),
    "dense-odd-heads": ({"width": 66, "head_width": 16}, None),
    "layer": ({"router": LEARNED, "rope_scaling": LLAMA3}, None),
    "module-tied": ({**VARIANTS["mqa-tied-wide-head"], "router": MODULE}, None),
    "random": ({"router": {**MODULE, "kind": "random"}, "qk_norm": True}, None),
    "stride": ({"router": {**LEARNED, "kind": "stride", "always_on_last": 1}}, None),
    "some-layers": ({"router": {**MODULE, "layers": [1, 3]}, "layers": 5}, None),
    "ensemble": ({"tied_head": True}, {"layers": 3, "temperature": 2.0}),
    "layer-ensemble": ({"router": LEARNED}, {"layers": 2}),
    "module-ensemble": ({"router": MODULE, "rope_scaling": {"kind": "linear", "factor": 2.0}}, {"layers": 3, "top": 2}),
}
"""Model block and ensemble block."""
THRESHOLDS = {"layer": torch.tensor([0.2, -math.inf, -0.3]), "module-ensemble": torch.tensor([0.1, -0.1, 0.2, 0.0])}
"""Of cases whose routers do not compare with 0."""
NATIVE = {"dense": "Llama", "dense-tied-llama3": "Llama", "dense-qk-norm": "Qwen3"}


def make(name: str, seed: int = 1) -> Decoder:
    """A case's decoder, in evaluation mode; the ensemble's weights off their beginnings."""
    model, ensemble = CASES[name]
    made = _assemble({**SIZES, "vocab_size": VOCAB, "max_positions": 128, **model}, ensemble, seed)
    made.thresholds = THRESHOLDS.get(name)
    return made


def _assemble(model: dict[str, Any], ensemble: dict[str, Any] | None, seed: int) -> Decoder:
    made = decoder(ModelConfig.model_validate(model), seed)
    if ensemble is not None:
        made.add_ensemble(EnsembleConfig.model_validate(ensemble))
        assert made.ensemble is not None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.ensemble.parameters():
                parameter.uniform_(0.5, 1.5, generator=generator)
    return made.eval()


def make_large() -> Decoder:
    """One of 80 MB in fp32, no weight of it above 2 MB, in which two layers vote."""
    sizes = {**SIZES, "vocab_size": VOCAB, "max_positions": 128, "head_width": None}
    return _assemble({**sizes, "layers": 10, "width": 384, "heads": 6, "ffn_width": 1280}, {"layers": 2}, 1)


def make_tuned(made: Decoder, kind: str) -> tuple[Decoder, dict[str, Any]]:
    """``made`` with adapters that change it, and the config's ``adapter`` block."""
    block = {"kind": kind, "rank": 4, "layers": "all" if made.ensemble is None else "early"}
    prepare(made, AdapterConfig.model_validate(block), "frozen", seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if part_of(key) == "adapters":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made.eval(), block


def write_run(
    folder: Path,
    model: Decoder,
    data: dict[str, Any],
    stage: int = 2,
    ranks: int = 1,
    adapter: dict[str, Any] | None = None,
) -> Path:
    """A run folder whose checkpoint holds ``model`` in fp32, as ``ranks`` processes at ZeRO ``stage`` write it.

    Args:
        folder: the new run folder.
        model: one with an ensemble, or with ``adapter``, makes a tuning run.
        data: the run's data block.
        stage: 2, where whole weights are, or 3, where each rank has a part of each.
        ranks: how many.
        adapter: the config's block where the model has adapters.
    """
    saved = folder / "checkpoints/step-00000003"
    (saved / "deepspeed").mkdir(parents=True)
    blocks: dict[str, Any] = {
        "model": model.config.model_dump(mode="json"),
        "data": data,
        "train": {
            "run_dir": str(folder), "steps": 4, "global_batch_samples": 4, "micro_batch_samples": 1,
            "precision": "fp32", "optimizer": {"lr": 0.1},
        },
        "deepspeed": {"zero_stage": stage},
    }  # fmt: skip
    kind: type[PretrainConfig] | type[TuneConfig] = PretrainConfig
    if model.ensemble is not None or adapter is not None:
        kind = TuneConfig
        examples = {"sequence_tokens": 32, "tokenizer": data["dir"], "sources": [{"name": "a", "files": ["a.jsonl"]}]}
        ensemble = None if model.ensemble is None else model.ensemble.config.model_dump(mode="json")
        blocks |= {"base": {"path": "base", "seed": model.seed}, "ensemble": ensemble, "data": examples}
        blocks["adapter"] = adapter or {"kind": "full"}
    config = to_yaml(kind.model_validate(blocks)).encode()
    for path in (folder, saved):
        (path / "config.yaml").write_bytes(config)
    weights = dict(model.named_parameters())
    if stage == 2:
        torch.save({"module": weights}, saved / "deepspeed/mp_rank_00_model_states.pt")
    else:
        _write_parts(saved / "deepspeed", weights, ranks)
    torch.save({} if model.thresholds is None else {"thresholds": model.thresholds}, saved / "trainer.pt")
    manifest.write(saved, {"step": 3, "world_size": ranks})
    (folder / "metrics.jsonl").write_text(
        '{"step": 3, "train/tokens": 384, "train/loss": 5.5, "density/mean": 0.25}\n'
        '{"step": 3, "validation/code/loss": 5.25}\n{"step": 4, "train/tokens": 512}\n{"step": 4, "tra'
    )
    return folder


def _write_parts(folder: Path, weights: dict[str, Tensor], ranks: int) -> None:
    """ZeRO 3: equal parts of every parameter, the last one padded."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    for rank in range(ranks):
        parts = []
        for weight in weights.values():
            size = math.ceil(weight.numel() / ranks)
            flat = torch.zeros(size * ranks)
            flat[: weight.numel()] = weight.detach().flatten()
            parts.append(flat[rank * size : (rank + 1) * size])
        model = {"param_shapes": [shapes], "frozen_param_shapes": {}, "frozen_param_fragments": {}}
        optimizer = {"optimizer_state_dict": {"fp32_flat_groups": [torch.cat(parts)]}}
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save(optimizer, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
