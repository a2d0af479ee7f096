"""What a checkpoint's config.json may say: old and other spellings of the same, and what cannot be represented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from convert.from_hf import import_checkpoint, read_checkpoint
from model.config import RopeScaling
from tests.convert.hf_checkpoints import LLAMA3, Edit
from tests.threads import one_thread as one_thread


def test_rope_as_transformers_4_wrote_it(edited: Edit, tmp_path: Path) -> None:
    """Also without ``head_dim`` and, as the first Llama had it, without ``num_key_value_heads``."""
    old = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    folder = edited("llama-3", rope_parameters=..., rope_theta=500_000.0, rope_scaling={**old, "type": "llama3"})
    config = read_checkpoint(folder)[0].config
    assert config.rope_theta == 500_000.0
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_positions=32)
    assert import_checkpoint(folder, tmp_path / "out")

    folder = edited("llama-linear", rope_parameters=..., rope_scaling=None, rope_theta=777.0, head_dim=...,
                    num_key_value_heads=..., tie_word_embeddings=...)  # fmt: skip
    config = read_checkpoint(folder)[0].config
    assert (config.rope_theta, config.rope_scaling, config.kv_heads, config.head_dim) == (777.0, None, 4, 8)
    assert import_checkpoint(folder, tmp_path / "out2")


def test_llama3_scaling_without_the_original_length_takes_the_longest_context(edited: Edit) -> None:
    folder = edited(rope_parameters={k: v for k, v in LLAMA3.items() if not k.startswith("original")})
    scaling = read_checkpoint(folder)[0].config.rope_scaling
    assert scaling is not None and scaling.original_positions == 96


def test_two_names_of_one_activation(edited: Edit, tmp_path: Path) -> None:
    lines = import_checkpoint(edited(hidden_act="swish"), tmp_path / "out")
    assert any("logits are transformers'" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("llama", {"model_type": "qwen2"}, "model_type qwen2 cannot be imported, because its attention has biases and"),
        ("llama", {"model_type": "mixtral"}, "model_type mixtral cannot be imported; take a checkpoint of llama, mist"),
        ("llama", {"model_type": ...}, "model_type None cannot be imported"),
        (
            "llama",
            {"hidden_size": ..., "vocab_size": "9"},
            "must give a number for vocab_size, hidden_size; restore it",
        ),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            "not support: attention_bias True (.* no biases); mlp_bias True (",
        ),
        (
            "llama",
            {"hidden_act": "gelu"},
            "asks for what this decoder does not support: hidden_act gelu (the feed-forw",
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config (weights must be float32, float16 or"),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 (here rotary embeddings cover whole heads)",
        ),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type yarn (default, linear and llama3 are"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rotary parameters that differ by layer",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}},
            "describes an invalid model: rope_scaling factor Field required",
        ),
        (
            "llama",
            {"num_key_value_heads": 3},
            "model: model.heads (4) must be divisible by model.kv_heads (3); restore",
        ),
        (
            "mistral",
            {"sliding_window": 32},
            "sliding_window 32 below max_position_embeddings 96 (.* lowered to 32, where",
        ),
        (
            "mistral",
            {"sliding_window": ..., "max_position_embeddings": 8192},
            "sliding_window 4096 below max_pos.* 8192",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8},
            "sliding_window 8 below max_position_embeddings 96",
        ),
    ],
)
def test_a_config_that_cannot_be_represented(edited: Edit, name: str, fields: dict[str, Any], sentence: str) -> None:
    folder = edited(name, **fields)
    pattern = r"config.json.*" + re.escape(sentence).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern) as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)
