"""The dense decoder against transformers' Llama (and Qwen3, for query and key norms), weights loaded by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from model.config import ModelConfig
from model.decoder import Decoder
from tests.model.tiny import SIZES, assert_close, config, decoder, random_targets, random_tokens

LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "wide head": {"head_width": 24},
    "tied": {"tied_head": True},
    "theta and epsilon": {"rope_theta": 500.0, "norm_epsilon": 1e-2},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": {"kind": "llama3", "original_positions": 64, **LLAMA3}},
    "qk norm": {"qk_norm": True},
}


def theirs(cfg: ModelConfig) -> transformers.PreTrainedModel:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling is not None:
        rope |= {"rope_type": cfg.rope_scaling.kind, "factor": cfg.rope_scaling.factor}
        if cfg.rope_scaling.kind == "llama3":
            rope |= LLAMA3 | {"original_max_position_embeddings": cfg.rope_scaling.original_positions}
    name = "Qwen3" if cfg.qk_norm else "Llama"
    made = getattr(transformers, f"{name}Config")(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        intermediate_size=cfg.ffn_width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        max_position_embeddings=cfg.max_positions,
        rms_norm_eps=cfg.norm_epsilon,
        tie_word_embeddings=cfg.tied_head,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    return getattr(transformers, f"{name}ForCausalLM")(made).eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    cfg = ModelConfig.model_validate(SIZES | CASES[case])
    ours, other = decoder(cfg).eval(), theirs(cfg)
    weights = {n if n.startswith("lm_head.") else f"model.{n}": w for n, w in ours.state_dict().items()}
    assert set(weights) == set(other.state_dict())
    other.load_state_dict(weights)
    tokens = random_tokens(length=80)
    with torch.no_grad():
        expected = other(tokens).logits
        found = ours(tokens).logits
    assert expected.std() > 0.5
    assert_close(found, expected, 2e-5 / max(float(expected.abs().max()), 1.0))
    if cfg.rope_scaling is not None:  # and the scaling is not lost on both sides
        plain = Decoder(cfg.model_copy(update={"rope_scaling": None}))
        plain.load_state_dict(ours.state_dict())
        with torch.no_grad():
            assert (plain(tokens).logits - expected).abs().max() > 1e-2


def test_loss_is_that_of_the_logits() -> None:
    model = decoder(config()).eval()
    targets = random_targets()
    with torch.no_grad():
        loss = model(random_tokens(), targets, z_coefficient=0.1).loss
        logits = model(random_tokens()).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert_close(loss.nll, nll)
    assert_close(loss.loss, nll + 0.1 * loss.z)


def test_loss_is_a_sum_over_rows() -> None:
    """Micro-batches add up: halves of a batch sum to the whole, with the noise of each sample its own."""
    model = decoder(config(granularity="module"))
    tokens, targets, samples = random_tokens(4), random_targets(4), torch.tensor([3, 1, 4, 2])
    with torch.no_grad():
        whole = model(tokens, targets, sample_ids=samples)
        halves = [model(tokens[p], targets[p], sample_ids=samples[p]) for p in (slice(0, 1), slice(1, 4))]
    assert_close(sum(half.loss.loss for half in halves), whole.loss.loss)
    assert torch.equal(torch.cat([half.routing.executed for half in halves], dim=1), whole.routing.executed)


def test_tied_head_is_one_matrix() -> None:
    model = decoder(config("dense", "mqa-tied-wide-head"))
    assert model.lm_head.weight is model.embed_tokens.weight
    model(random_tokens(), random_targets()).loss.loss.backward()
    both = model.embed_tokens.weight.grad
    assert (both.abs().sum(1) > 0).all()  # the head reaches ids that are in no input


def test_bf16_runs_and_stays_near_fp32() -> None:
    model = decoder(config("stride")).eval()  # decisions that rounding cannot move
    with torch.no_grad():
        exact = model(random_tokens()).logits
        rounded = model.bfloat16()(random_tokens()).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_thresholds_that_were_read_go_where_the_tokens_are() -> None:
    """A base's lie on the CPU, and nothing else moves them to a GPU."""
    model = decoder(config("learned"))
    model.thresholds = torch.zeros(3)
    held = model._held(None, torch.device("meta"))
    assert held is not None and held.device.type == "meta"
