"""The shipped modelling file does in transformers what a model there must do; that it is our model: test_to_hf.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from tests.convert.test_to_hf import load, random_ids

Exported = Callable[[str], tuple[Path, Path]]
MODELS = ["layer-ensemble", "module-tied"]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, exported: Exported) -> Any:
    """An export, which goes on to its last token; not to be changed."""
    loaded = load(exported(request.param)[1])
    loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id = None, 3
    return loaded


def logits_of(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_with_the_cache_and_without(model: Any, options: dict[str, Any]) -> None:
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(random_ids(3, 9), max_new_tokens=12, use_cache=cached, **options))
    assert torch.equal(*found)


def test_static_cache(model: Any) -> None:
    usual = model.generate(random_ids(2, 9), max_new_tokens=12)
    assert torch.equal(usual, model.generate(random_ids(2, 9), max_new_tokens=12, cache_implementation="static"))


def test_a_left_padded_batch_is_its_rows_alone(model: Any) -> None:
    prompts = [random_ids(1, length, length) for length in (3, 7, 12)]
    batch, mask = torch.full((3, 12), 3), torch.zeros(3, 12, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, 12 - prompt.shape[1] :], mask[row, 12 - prompt.shape[1] :] = prompt[0], 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=16)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 12:], model.generate(prompt, max_new_tokens=16)[0, prompt.shape[1] :])


def test_random_and_stride_routers_count_a_rows_own_positions(exported: Exported) -> None:
    for name in ("random", "stride"):
        loaded, prompt = load(exported(name)[1]), random_ids(1, 7)
        padded = torch.cat([torch.full((1, 5), 3), prompt], dim=1)
        mask = (torch.arange(12) >= 5).long()[None]
        alone = loaded.generate(prompt, max_new_tokens=10)[0, 7:]
        assert torch.equal(loaded.generate(padded, attention_mask=mask, max_new_tokens=10)[0, 12:], alone)


def test_saved_again_and_loaded(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits_of(again, random_ids(2, 30)), logits_of(model, random_ids(2, 30)))


def test_other_ways_to_compute_the_same(model: Any, exported: Exported) -> None:
    tokens = random_ids(3, 40)
    expected = logits_of(model, tokens)
    for field, value in (("execution", "mask"), ("_attn_implementation", "eager")):
        before = getattr(model.config, field)
        setattr(model.config, field, value)
        try:
            torch.testing.assert_close(logits_of(model, tokens), expected, rtol=0, atol=1e-4)
        finally:
            setattr(model.config, field, before)
    kept = logits_of(model, tokens, logits_to_keep=2)
    torch.testing.assert_close(kept, expected[:, -2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 8, 9])
def test_skipped_tokens_cost_nothing_in_generate(model: Any, batch: int) -> None:
    """Rows that pass the feed-forwards are those that the routers chose; one new token for each of up to eight rows is
    computed for all of them where any executes."""
    computed = []
    handles = [
        layer.mlp.register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].flatten(0, -2).shape[0]))
        for layer in model.model.layers
    ]
    tokens = model.generate(random_ids(batch, 9), max_new_tokens=20)
    chosen = sum(computed)
    with torch.no_grad():
        executed = torch.stack(model(tokens[:, :-1], output_executed=True)["executed"])
    computed.clear()
    model.config.skip_layers = False
    try:
        model.generate(random_ids(batch, 9), max_new_tokens=20)
    finally:
        model.config.skip_layers = True
    for handle in handles:
        handle.remove()
    layers = len(model.model.layers)
    assert sum(computed) == layers * batch * 28
    routed = executed if len(executed) == layers else executed[1::2]  # of module routers every second
    if 1 < batch <= 8:
        routed[..., 9:] |= routed[..., 9:].any(1, keepdim=True)
    assert chosen == int(routed.sum()) + (layers - len(routed)) * batch * 28 < sum(computed)


def test_gradients_with_recomputation_and_without(exported: Exported) -> None:
    tokens = random_ids(2, 30)
    found: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        fresh: nn.Module = load(exported("layer-ensemble")[1]).train()
        if recompute:
            fresh.gradient_checkpointing_enable()  # type: ignore[operator]
        fresh(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in fresh.named_parameters() if p.grad is not None})
    # Decisions are hard: only routers are left out.
    missing = {name for name, _ in fresh.named_parameters()} - found[0].keys()
    assert missing == {f"model.layers.{layer}.router.weight" for layer in range(3)}
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("name", ["layer", "module-tied"])
def test_where_no_token_executes(exported: Exported, name: str) -> None:
    """The embedding goes straight to the head, and in training every weight still has a gradient."""
    fresh = load(exported(name)[1])
    routers = [module for key, module in fresh.named_modules() if key.endswith("router")]
    for router in routers:
        router.register_forward_hook(lambda _, __, output: (torch.zeros_like(output[0]),))
    tokens = random_ids(2, 12)
    fresh(tokens, labels=tokens).loss.backward()
    missing = {key for key, parameter in fresh.named_parameters() if parameter.grad is None}
    assert missing == {key for key, _ in fresh.named_parameters() if "router" in key}
    if name == "layer":
        with torch.no_grad():
            expected = fresh.lm_head(fresh.model.norm(fresh.model.embed_tokens(tokens)))
        assert torch.equal(logits_of(fresh, tokens), expected)
        assert fresh.generate(tokens, max_new_tokens=3, min_new_tokens=3, pad_token_id=3).shape == (2, 15)


def test_three_steps_of_the_trainer(exported: Exported, tmp_path: Path) -> None:
    fresh = load(exported("layer-ensemble")[1])
    rows = [{"input_ids": row, "labels": row} for row in random_ids(6, 20)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    before = fresh.model.norm.weight.clone()
    done = Trainer(model=fresh, args=arguments, train_dataset=rows).train()
    assert done.global_step == 3 and not torch.equal(before, fresh.model.norm.weight)


def test_pipeline(exported: Exported) -> None:
    out = exported("layer-ensemble")[1]
    tokenizer = AutoTokenizer.from_pretrained(out)
    generator = pipeline("text-generation", model=load(out), tokenizer=tokenizer)
    said = generator(["import os", "def f("], max_new_tokens=5, do_sample=False, batch_size=2)
    for entry, start in zip(said, ["import os", "def f("], strict=True):
        assert entry[0]["generated_text"].startswith(start)


def test_missing_weights_are_drawn_not_left_unfilled(exported: Exported) -> None:
    loaded = load(exported("layer-ensemble")[1])
    drawn = type(loaded)(loaded.config)
    assert all(torch.isfinite(p).all() for p in drawn.parameters())
    assert float(drawn.model.layers[0].router.weight.detach().std()) > 0
    assert float(drawn.model.ensemble.router.weight.detach().abs().max()) == 0


def test_tokens_and_embeddings_together_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
