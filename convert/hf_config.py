"""Translate a Hugging Face ``config.json`` to this decoder's config, or report all that the decoder does not support.

Rotary parameters are read as transformers 5 writes them (``rope_parameters``) and as 4 did (``rope_theta`` and
``rope_scaling``). Routers and an ensemble are those of ``HopscotchConfig`` in ``convert/modeling_hopscotch.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.config import EnsembleConfig, ModelConfig

HOPSCOTCH = "hopscotch"
"""The family that ``convert.to_hf`` writes with a modelling file of its own."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    HOPSCOTCH: {
        "num_key_value_heads": 16,
        "head_dim": 64,
        "qk_norm": False,
        "router_kind": None,
        "router_granularity": "layer",
        "router_input": "normed",
        "router_density": 1.0,
        "router_first_layer": 0,
        "router_end_layer": 0,
        "router_layers": None,
        "router_seed": 0,
        "router_thresholds": None,
        "skip_layers": True,
        "ensemble_layers": 0,
        "ensemble_temperature": 1.0,
        "ensemble_top": None,
    },
}
"""Families that can be imported, and the defaults of fields that their configs leave out."""
_NEEDED = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_epsilon",
}
"""Required fields, and their names here."""
_OF_ROUTERS = ("router_density", "router_first_layer", "router_end_layer")
_KINDS = ("learned", "random", "stride")
_SEEDS = 2**62


def model_config(raw: dict[str, Any], where: Path) -> ModelConfig:
    """The ``model`` block for a checkpoint.

    Args:
        raw: the contents of its ``config.json``.
        where: that file, for messages.

    Raises:
        ValueError: if it is of no supported family, or has something that this decoder does not support.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        why = ", because its attention has biases and this decoder's has none" if family == "qwen2" else ""
        raise ValueError(
            f"{where}: model_type {family} cannot be imported{why}; take a checkpoint of {', '.join(FAMILIES)}"
        )
    config = {**FAMILIES[family], **raw}
    needed = (*_NEEDED, *(_OF_ROUTERS if config.get("router_kind") is not None and family == HOPSCOTCH else ()))
    missing = [name for name in needed if not isinstance(config.get(name), int | float)]
    if missing:
        raise ValueError(f"{where} must give a number for {', '.join(missing)}; restore it, or download it again")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    problems = [*_unsupported(config), *_unsupported_rope(config, rope)]
    if problems:
        raise ValueError(f"{where} asks for what this decoder does not support: {'; '.join(problems)}")
    sizes = {ours: config[theirs] for theirs, ours in _NEEDED.items()}
    try:
        return ModelConfig.model_validate(
            {
                **sizes,
                "kv_heads": config.get("num_key_value_heads") or sizes["heads"],
                "head_width": config.get("head_dim"),
                "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
                "rope_scaling": _rope_scaling(config, rope),
                "qk_norm": family == "qwen3" or (family == HOPSCOTCH and bool(config["qk_norm"])),
                "tied_head": bool(config.get("tie_word_embeddings")),
                "router": _router(config),
            }
        )
    except ValidationError as error:
        raise _impossible(error, where) from None


def ensemble_config(raw: dict[str, Any], where: Path) -> EnsembleConfig | None:
    """The ``ensemble`` block for a checkpoint that :func:`model_config` takes; None without one.

    Fields that only training reads are not in exports and get their defaults.

    Raises:
        ValueError: if it is invalid.
    """
    config = {**FAMILIES[raw["model_type"]], **raw}
    if raw["model_type"] != HOPSCOTCH or not config["ensemble_layers"]:
        return None
    found = {name: config[f"ensemble_{name}"] for name in ("layers", "temperature", "top")}
    try:
        ensemble = EnsembleConfig.model_validate(found)
    except ValidationError as error:
        raise _impossible(error, where) from None
    if ensemble.layers > config["num_hidden_layers"]:
        raise ValueError(
            f"{where} describes an invalid model: ensemble_layers ({ensemble.layers}) exceeds num_hidden_layers "
            f"({config['num_hidden_layers']}); restore it, or download it again"
        )
    return ensemble


def routing_seed(raw: dict[str, Any], where: Path) -> int:
    """The seed that routers of kind ``random`` decide by; 0 where none is given.

    Raises:
        ValueError: if it is no valid seed.
    """
    seed = raw.get("router_seed", 0) if raw["model_type"] == HOPSCOTCH else 0
    if not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise ValueError(
            f"{where} has router_seed {seed}, but a seed must be a whole number from 0 to 2^62 - 1; restore it, or "
            "download it again"
        )
    return seed


def routing_thresholds(raw: dict[str, Any], where: Path, sites: int) -> list[float | None] | None:
    """Thresholds of the margins of the ``sites`` routers, None for minus infinity; None instead of a list means 0.

    Raises:
        ValueError: if there is not a number or null for every site.
    """
    found = raw.get("router_thresholds") if raw["model_type"] == HOPSCOTCH else None
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != sites or not all(isinstance(t, int | float | None) for t in found):
        raise ValueError(
            f"{where}: router_thresholds must be a list of {sites} numbers, one for each routed site, null for none, "
            f"got {found!r:.60}; restore it, or download it again"
        )
    return found


def _impossible(error: ValidationError, where: Path) -> ValueError:
    rules = "; ".join(" ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors())
    return ValueError(f"{where} describes an invalid model: {rules}; restore it, or download it again")


def _router(config: dict[str, Any]) -> dict[str, Any] | None:
    """The ``router`` block; schedules and budget only matter in training, are not exported, and get their defaults."""
    if config["model_type"] != HOPSCOTCH or config["router_kind"] is None:
        return None
    return {
        **{name: config[f"router_{name}"] for name in ("kind", "density", "granularity", "input")},
        "always_on_first": config["router_first_layer"],
        "always_on_last": config["num_hidden_layers"] - config["router_end_layer"],
        "layers": "all" if config["router_layers"] is None else config["router_layers"],
    }


def _unsupported(config: dict[str, Any]) -> list[str]:
    problems = [
        f"{name} {config[name]} (projections here have no biases)"
        for name in ("attention_bias", "mlp_bias")
        if config.get(name)
    ]
    if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        problems.append(f"hidden_act {config['hidden_act']} (the feed-forward here is SwiGLU, silu)")
    if config.get("quantization_config"):
        problems.append(
            "quantization_config (weights must be float32, float16 or bfloat16; take those before quantising)"
        )
    if config["model_type"] == HOPSCOTCH and config["router_kind"] is not None:
        problems += _unsupported_routing(config)
    window, reach = _sliding_window(config), config["max_position_embeddings"]
    if window is not None and window < reach:
        problems.append(
            f"sliding_window {window} below max_position_embeddings {reach} (attention here has no window; import a "
            f"copy with max_position_embeddings lowered to {window}, where the window makes no difference)"
        )
    return problems


def _unsupported_routing(config: dict[str, Any]) -> list[str]:
    problems = []
    if config["router_kind"] not in _KINDS:
        problems.append(
            f"router_kind {config['router_kind']} ({', '.join(_KINDS[:-1])} and {_KINDS[-1]} are supported)"
        )
    if not config["skip_layers"]:
        problems.append("skip_layers false (routers here always decide; set it to true)")
    return problems


def _sliding_window(config: dict[str, Any]) -> int | None:
    """Window in tokens that some layer attends to; None if all layers see everything, as in all other families."""
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
        problems.append(f"rope_type {_rope_type(rope)} (default, linear and llama3 are supported)")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if partial != 1:
        problems.append(f"partial_rotary_factor {partial} (here rotary embeddings cover whole heads)")
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
