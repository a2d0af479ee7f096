"""What the demo's export says, through transformers alone: ``python -m launch.demo_sentence runs/demo-hf``.

The folder's own modelling file runs here, which is why transformers asks for ``trust_remote_code``: it is ours, written
a moment ago by ``convert.to_hf``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from settings import user_errors

PROMPT = 'def add(left, right):\n    """Return the sum of left and right."""\n'


def main() -> int:
    """Print the prompt and what the model makes of it."""
    parser = argparse.ArgumentParser(prog="launch.demo_sentence", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what convert.to_hf wrote")
    parser.add_argument("--prompt", default=PROMPT)
    arguments = parser.parse_args()
    with user_errors():
        print(continued(arguments.folder, arguments.prompt))
    return 0


def continued(folder: str, prompt: str) -> str:
    """``prompt`` and up to 60 greedy tokens.

    Raises:
        ValueError: if there is no export in ``folder``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is no export: it has no config.json; write one with python -m convert.to_hf")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        made = model.generate(tokens, max_new_tokens=60, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


if __name__ == "__main__":
    raise SystemExit(main())
