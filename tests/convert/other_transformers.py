"""Loads exports with whatever transformers lies on the path, and writes down what that computes.

    PYTHONPATH=FOLDER python tests/convert/other_transformers.py OUT.json EXPORT [EXPORT ...]

Nothing of ours is imported: an export's users have nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PAD, NEW_TOKENS = 3, 12
PADDED = (5, 2, 0)
"""How many tokens of each row are padding on the left."""
TEXT = "def f(x):\n    return  x </s> é🙂"


def load(folder: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what its loader complains of."""
    options = {"trust_remote_code": True, "torch_dtype": torch.float32, "output_loading_info": True, **options}
    model, found = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model.eval(), {what: sorted(map(str, names)) for what, names in found.items() if names}


def generated(model: Any, tokens: Tensor) -> dict[str, Any]:
    """Continuations with and without a cache, by beams, of padded rows and of the same rows alone."""

    def ids(prompt: Tensor, **options: Any) -> list[list[int]]:
        made: list[list[int]] = model.generate(prompt, max_new_tokens=NEW_TOKENS, **options)[
            :, prompt.shape[1] :
        ].tolist()
        return made

    padded, mask = tokens.clone(), torch.ones_like(tokens)
    for row, count in enumerate(PADDED):
        padded[row, :count], mask[row, :count] = PAD, 0
    return {
        "greedy": ids(tokens),
        "greedy without a cache": ids(tokens, use_cache=False),
        "beams": ids(tokens, num_beams=3),
        "beams without a cache": ids(tokens, num_beams=3, use_cache=False),
        "static cache": ids(tokens, cache_implementation="static"),
        "padded": ids(padded, attention_mask=mask),
        "alone": [ids(padded[row : row + 1, count:])[0] for row, count in enumerate(PADDED)],
    }


def found_in(folder: str) -> dict[str, Any]:
    """Everything about one export, ready for JSON."""
    model, complaints = load(folder)
    tokens = torch.randint(4, 300, (len(PADDED), 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
        eager = load(folder, attn_implementation="eager")[0](tokens).logits
        executed = model(tokens, output_executed=True)["executed"] if model.config.model_type == "hopscotch" else ()
    generations = generated(model, tokens)
    model.train().gradient_checkpointing_enable()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    gradients = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    return {
        "complaints": complaints,
        "logits": output.logits.tolist(),
        "hidden states": [list(state.shape) for state in output.hidden_states],
        "eager": eager.tolist(),
        "executed": [site.tolist() for site in executed],
        "generated": generations,
        "loss": float(loss.detach()),
        "gradients": gradients,
        "ids": AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXT)["input_ids"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {"version": transformers.__version__} | {folder: found_in(folder) for folder in sys.argv[2:]}
    Path(sys.argv[1]).write_text(json.dumps(result))
