"""Models on disk that the tests of ``evals/`` share: random weights, drawn wide, and the corpus's tokenizer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import yaml

from model.config import EnsembleConfig, ModelConfig
from model.decoder import Decoder
from tests.model.tiny import decoder
from trainer.checkpoints import manifest
from trainer.checkpoints.weights_folder import write_weights

POSITIONS = 64
SIZES = {
    "vocab_size": 400,
    "layers": 4,
    "width": 32,
    "heads": 2,
    "kv_heads": 1,
    "ffn_width": 48,
    "max_positions": POSITIONS,
    "init_std": 0.3,
}
ROUTERS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "layer": {"density": 0.5},
    "module": {"density": 0.5, "granularity": "module", "always_on_first": 1},
    "ensemble": {"density": 0.5},
}


def model(name: str, **sizes: Any) -> Decoder:
    """One of ``ROUTERS``, in evaluation mode."""
    made = decoder(ModelConfig.model_validate({**SIZES, "router": ROUTERS[name], **sizes})).eval()
    if name == "ensemble":
        made.add_ensemble(EnsembleConfig(layers=2))
    return made


def weights_folder(out: Path, name: str, corpus: dict[str, Any], **sizes: Any) -> Path:
    """``out``, in which :func:`model` then lies."""
    write_weights(model(name, **sizes), out, Path(corpus["dir"]), {"source": "a test"})
    return out


def broken_weights(out: Path, name: str, corpus: dict[str, Any], token: int) -> Path:
    """The same, with logits that are not finite wherever ``token`` is read or was."""
    broken = model(name)
    with torch.no_grad():
        broken.embed_tokens.weight[token] = math.nan
    write_weights(broken, out, Path(corpus["dir"]), {"source": "a test"})
    return out


def run_folder(out: Path, tiny: dict[str, Any]) -> Path:
    """``out``, a stage-one run with one checkpoint at step 7, as ZeRO stage 0 in fp32 leaves it."""
    config = copy.deepcopy(tiny)
    config["deepspeed"]["zero_stage"] = 0
    config["model"] |= {**SIZES, "router": ROUTERS["layer"]}
    checkpoint = out / "checkpoints/step-00000007"
    (checkpoint / "deepspeed").mkdir(parents=True)
    torch.save({"module": model("layer").state_dict()}, checkpoint / "deepspeed/mp_rank_00_model_states.pt")
    torch.save({}, checkpoint / "trainer.pt")
    for folder in (checkpoint, out):
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    manifest.write(checkpoint, {"step": 7, "world_size": 1})
    return out
