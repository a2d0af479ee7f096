"""A Hugging Face ``config.json`` in this decoder's terms, or a sentence on everything in it that has no such terms.

Rotary parameters are read as transformers 5 writes them (``rope_parameters``) and as 4 did (``rope_theta`` and
``rope_scaling``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.config import ModelConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
"""What can be imported, and what a field that is left out means there."""
_NEEDED = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_epsilon",
}
"""Fields that must be there, and their names here."""


def model_config(raw: dict[str, Any], where: Path) -> ModelConfig:
    """The ``model`` block for a checkpoint.

    Args:
        raw: the contents of its ``config.json``.
        where: that file, for messages.

    Raises:
        ValueError: if it is no checkpoint of these families, or has something that this decoder does not.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        why = ", it has biases in its attention and this decoder has none" if family == "qwen2" else ""
        raise ValueError(
            f"{where}: model_type {family} cannot be imported{why}; take a checkpoint of {', '.join(FAMILIES)}"
        )
    config = {**FAMILIES[family], **raw}
    missing = [name for name in _NEEDED if not isinstance(config.get(name), int | float)]
    if missing:
        raise ValueError(f"{where} must give a number for {', '.join(missing)}; restore it, or download it again")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    problems = [*_unsupported(config), *_unsupported_rope(config, rope)]
    if problems:
        raise ValueError(f"{where} asks for what this decoder does not have: {'; '.join(problems)}")
    sizes = {ours: config[theirs] for theirs, ours in _NEEDED.items()}
    try:
        return ModelConfig.model_validate(
            {
                **sizes,
                "kv_heads": config.get("num_key_value_heads") or sizes["heads"],
                "head_width": config.get("head_dim"),
                "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
                "rope_scaling": _rope_scaling(config, rope),
                "qk_norm": family == "qwen3",
                "tied_head": bool(config.get("tie_word_embeddings")),
            }
        )
    except ValidationError as error:
        rules = "; ".join(
            " ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
        )
        raise ValueError(f"{where} describes no possible model: {rules}; restore it, or download it again") from None


def _unsupported(config: dict[str, Any]) -> list[str]:
    problems = [
        f"{name} {config[name]} (projections here have no biases)"
        for name in ("attention_bias", "mlp_bias")
        if config.get(name)
    ]
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']} (the feed-forward here is SwiGLU, silu)")
    if config.get("quantization_config"):
        problems.append(
            "quantization_config (weights must be float32, float16 or bfloat16; take those before quantising)"
        )
    window, reach = _sliding_window(config), config["max_position_embeddings"]
    if window is not None and window < reach:
        problems.append(
            f"sliding_window {window} below max_position_embeddings {reach} (attention here sees everything; in a copy "
            f"with max_position_embeddings lowered to {window} the sliding window hides nothing)"
        )
    return problems


def _sliding_window(config: dict[str, Any]) -> int | None:
    """How many tokens back some layer sees; None where all see everything. Llama has no such thing."""
    if config["model_type"] == "mistral":
        return config["sliding_window"]
    if config["model_type"] == "qwen3" and config.get("use_sliding_window"):
        return config.get("sliding_window", 4096)
    return None


def _unsupported_rope(config: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return [f"rotary parameters that differ by layer, {rope}"]
    problems = []
    if _rope_type(rope) not in ("default", "linear", "llama3"):
        problems.append(f"rope_type {_rope_type(rope)} (default, linear and llama3 are there)")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if partial != 1:
        problems.append(f"partial_rotary_factor {partial} (whole heads are turned)")
    return problems


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_scaling(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = _rope_type(rope)
    if kind == "default":
        return None
    names = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    scaling = {"kind": kind} | {name: rope[name] for name in names if name in rope}
    if kind == "llama3":
        # In transformers' order of precedence.
        places = (config, rope, {"original_max_position_embeddings": config["max_position_embeddings"]})
        found = (place.get("original_max_position_embeddings") for place in places)
        scaling["original_positions"] = next(value for value in found if value is not None)
    return scaling
