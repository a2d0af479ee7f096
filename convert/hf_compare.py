"""Is an export the model that was exported? Logits of random tokens and a greedy continuation, ours and transformers'.

Dimension letters: B batch, T tokens, V vocabulary, S routed sites.
"""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.agreement import Decisions
from model.decoder import Decoder
from model.generate import generate

TOLERANCE = 1e-4
"""Largest difference between logits, as a share of their range or of 1, whichever is more."""
ADAPTER_FOLDER = "adapter"
"""Folder in an export of the adapters that it keeps apart."""
_ROWS, _TOKENS, _PROMPT_TOKENS, _GREEDY_TOKENS = 8, 32, 8, 64
_TOLD = 3


class Reference(NamedTuple):
    """What our decoder says, to compare with."""

    tokens: Tensor
    """Random, int64 [B, T]."""
    logits: Tensor
    """fp32 [B, T, V]."""
    decisions: Decisions
    """Of all of them."""
    prompt: Tensor
    """int64 [1, T]."""
    continued: Tensor
    """The prompt and its greedy continuation, int64 [1, T]."""
    gaps: Tensor
    """Largest logit minus the second, before each continued token, fp32 [new]."""
    continued_decisions: Decisions
    """In one pass over them."""


@torch.no_grad()
def refer(decoder: Decoder) -> Reference:
    """What ``decoder`` says of random tokens, and how it goes on from some of them."""
    config = decoder.config
    length = min(_TOKENS, config.max_positions)
    tokens = torch.randint(config.vocab_size, (_ROWS, length), generator=torch.Generator().manual_seed(0))
    prompt = tokens[:1, : max(min(_PROMPT_TOKENS, length // 2), 1)]
    continued = generate(decoder, prompt, min(_GREEDY_TOKENS, config.max_positions - prompt.shape[1]))
    rows, row = decoder(tokens), decoder(continued)
    best = row.logits[0, prompt.shape[1] - 1 : -1].topk(2, dim=-1).values
    decided, decided_on = (Decisions.of(run.routing, decoder.thresholds) for run in (rows, row))
    return Reference(tokens, rows.logits, decided, prompt, continued, best[:, 0] - best[:, 1], decided_on)


@torch.no_grad()
def compare(reference: Reference, folder: Path) -> str:
    """Load ``folder`` with transformers, in fp32 on the CPU, and compare; returns a sentence on what was found.

    Adapters that it keeps apart are put on it by PEFT.

    A router may tip over on rounding where a token's two logits are all but equal, after which everything in that row
    may differ; such rows are reported and left out. The modelling file in ``folder`` is run: only for what we wrote.

    Raises:
        ValueError: if transformers cannot load it, or anything differs.
    """
    kept = f"it is kept in {folder} for inspection, and nothing else was written"
    model = _load(folder, kept)
    logits, executed = _theirs(model, reference.tokens, reference.decisions)
    alike = _same_rows(reference.decisions, executed, kept)
    largest = float((logits - reference.logits)[alike].abs().amax()) if bool(alike.any()) else float("inf")
    span = float(reference.logits.max() - reference.logits.min())
    if not largest <= TOLERANCE * max(span, 1.0):  # NaN as well
        raise ValueError(
            f"the export's logits differ by {largest:.2g}, above {TOLERANCE:g} of their range ({span:.3g}), on "
            f"{int(alike.sum())} of {len(alike)} rows; {kept}"
        )
    said = f"logits in transformers are ours: largest difference {largest:.2g} of a range of {span:.3g}, on "
    said += f"{int(alike.sum())} of {len(alike)} rows of {reference.tokens.shape[1]} random tokens; "
    return said + _compare_greedy(model, reference, TOLERANCE * max(span, 1.0), kept)


def _compare_greedy(model: Any, reference: Reference, tolerance: float, kept: str) -> str:
    """A continuation may part from ours at a tie: of the two best tokens, or of a router."""
    from transformers import GenerationConfig

    start, new = reference.prompt.shape[1], reference.continued.shape[1] - reference.prompt.shape[1]
    # Its own config may end texts, sample, or punish repetition; the reference does nothing of that.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    theirs = model.generate(reference.prompt, attention_mask=torch.ones_like(reference.prompt))
    if torch.equal(theirs, reference.continued):
        return f"the same {new} tokens greedily"
    place = int((theirs != reference.continued).nonzero()[0, 1]) - start
    decided = reference.continued_decisions
    _, executed = _theirs(model, reference.continued, decided)
    before = start + place
    tipped = not bool(_same_rows(decided.first(before), executed[..., :before], kept))
    if not tipped and float(reference.gaps[place]) > tolerance:
        raise ValueError(f"the export's greedy continuation differs from its token {place + 1} of {new} on; {kept}")
    return f"the same {place} tokens greedily, then a tie of two {'router' if tipped else 'token'} logits"


def _same_rows(ours: Decisions, executed: Tensor, kept: str) -> Tensor:
    """Rows that the export routes as we do, bool [B]."""
    try:
        return ours.same_rows(executed)
    except ValueError as error:
        raise ValueError(f"the export routes tokens differently: {error}; {kept}") from error


def _theirs(model: Any, tokens: Tensor, ours: Decisions) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and executed tokens [S, B, T], of as many sites as we have."""
    routed = len(ours.executed) > 0
    output = model(input_ids=tokens, **({"output_executed": True} if routed else {}))
    return output.logits, torch.stack(output["executed"]) if routed else ours.executed


def _load(folder: Path, kept: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # whatever it dislikes, in its own words
        raise ValueError(f"transformers cannot load the export ({_last_line(error)}); {kept}") from error
    model, found = loaded
    problems = [f"{what.replace('_', ' ')} {sorted(map(str, names))[:_TOLD]}" for what, names in found.items() if names]
    if problems:
        raise ValueError(f"transformers finds other weights in the export ({'; '.join(problems)}); {kept}")
    return (_with_adapter(model, folder / ADAPTER_FOLDER, kept) if (folder / ADAPTER_FOLDER).is_dir() else model).eval()


def _with_adapter(model: Any, folder: Path, kept: str) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # whatever it dislikes, in its own words
        raise ValueError(f"PEFT cannot put the adapter on the export ({_last_line(error)}); {kept}") from error


def _last_line(error: Exception) -> str:
    """What it says, without the names of every weight."""
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[-1], 200, placeholder=" ...") if lines else type(error).__name__
