"""Converts a dense export with CTranslate2's own converter, and writes down what its engine computes.

    PYTHONPATH=FOLDER python tests/convert/other_engine.py OUT.json EXPORT

Nothing of ours is imported, and no transformers or torch computes anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer


def found_in(export: str, converted: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Logits of the prompts, and their greedy continuations."""
    TransformersConverter(export).convert(converted)
    engine = ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(export)
    pieces = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
    made = engine.generate_batch(
        pieces, max_length=new_tokens, sampling_topk=1, include_prompt_in_result=False, end_token=[]
    )
    return {
        "version": ctranslate2.__version__,
        "logits": np.array(engine.forward_batch(pieces)).tolist(),
        "greedy": [one.sequences_ids[0] for one in made],
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    asked = json.loads(out.with_name("asked.json").read_text())
    out.write_text(json.dumps(found_in(sys.argv[2], str(out.with_name("converted")), **asked)))
