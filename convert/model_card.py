"""README.md of an export: what the model is, how it was trained, how it is loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from model.config import ModelConfig
from settings.tables import markdown

_LABELS = {
    "source": "exported from",
    "init": "started from",
    "base": "tuned from",
    "adapter": "tuning method",
    "step": "optimiser steps",
    "tokens": "training tokens",
    "train_loss": "training loss, nats a token",
    "precision": "precision in training",
    "zero_stage": "ZeRO stage",
    "world_size": "processes",
    "target_density": "target density, the compute budget",
    "executed_flops_per_token": "training FLOPs a token, executed",
    "dense_flops_per_token": "training FLOPs a token of the same model without skipping",
    "commit": "commit that trained it",
    "export_commit": "commit that exported it",
}


class Exported(NamedTuple):
    """What the card describes."""

    config: ModelConfig
    parameters: int
    ensemble_layers: int
    """How many late layers vote; 0 without an ensemble."""
    remote_code: bool
    """Whether the export has a modelling file."""
    adapter: str | None = None
    """Folder of adapters that are exported separately."""


def model_card(model: Exported, facts: dict[str, Any], checks: list[str]) -> str:
    """The card in Markdown.

    Args:
        model: what was exported.
        facts: as :func:`convert.facts.facts_of` returns them; what is None or missing is left out.
        checks: sentences on what was compared.
    """
    parts = [_front_matter(model), "# A Hopscotch model", _description(model), _usage(model)]
    parts += ["## Training", markdown([["fact", "value"], *_training_rows(facts)])]
    densities = {name: value for name, value in (facts.get("densities") or {}).items() if name != "overflow"}
    if densities and model.config.router is not None:
        rows = [[name, f"{value:.3f}"] for name, value in densities.items()]
        parts += [
            "## Density in training: share of tokens that executed a site",
            markdown([["site", "density"], *rows]),
        ]
    parts += ["## Checked at export", "\n".join(f"* {check}" for check in checks)]
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Exported) -> str:
    tags = ["hopscotch"]
    tags += ["skip-layer"] if model.config.router is not None else []
    tags += ["late-layer-ensemble"] if model.ensemble_layers else []
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {t}" for t in tags)]
    return "\n".join([*lines, "---"])


def _description(model: Exported) -> str:
    config, router = model.config, model.config.router
    text = (
        f"A decoder-only language model: {model.parameters:,} parameters, {config.layers} layers, width "
        f"{config.width}, {config.heads} heads ({config.kv_heads} key/value), feed-forward {config.ffn_width}, "
        f"vocabulary {config.vocab_size:,}, context {config.max_positions:,} tokens."
    )
    if router is not None:
        text += (
            f" Tokens skip layers: {router.kind} routers by {router.granularity} on {len(config.sites)} sites, trained "
            f"to execute {router.density:.0%} of the tokens (Zeng et al. 2023, arXiv:2311.15436)."
        )
    if model.ensemble_layers:
        text += f" Its last {model.ensemble_layers} layers vote (Luo and Specia 2024, arXiv:2410.13077)."
    return text


def _usage(model: Exported) -> str:
    flag = ", trust_remote_code=True" if model.remote_code else ""
    on_top = f'model = PeftModel.from_pretrained(model, "THIS_FOLDER/{model.adapter}")\n' if model.adapter else ""
    why = (
        "`trust_remote_code=True` runs `modeling_hopscotch.py` from this folder; read it first if you did not write "
        "it. The tokenizer needs no code; without a flag `AutoTokenizer` asks all the same, because it looks at the "
        "model's config first."
        if model.remote_code
        else "No code from this folder is run."
    )
    return (
        "```python\n"
        + ("from peft import PeftModel\n" if model.adapter else "")
        + "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{flag})\n'
        f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER"{flag})\n{on_top}'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n\n" + why
    )


def _training_rows(facts: dict[str, Any]) -> list[list[str]]:
    rows = [[label, _shown(facts[name])] for name, label in _LABELS.items() if facts.get(name) is not None]
    rows += [
        ["averaged checkpoint", _shown(f"{member['checkpoint']}, {member['share']:.2%} of the mean")]
        for member in facts.get("averaged") or []
    ]
    losses = facts.get("validation_losses") or {}
    return rows + [[f"validation loss on {name}, nats a token", f"{value:.4f}"] for name, value in losses.items()]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    # Text comes from configs and file names, and must not break a table's cell.
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).replace("|", "/").replace("`", "'").split())
