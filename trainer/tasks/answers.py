"""Answers that a model writes to prompts, by one rank or many.

One prompt at a time on each rank: skipping then saves time. With ``lockstep`` (ZeRO 3, where a pass needs all ranks)
every rank goes on until the longest answer of its round is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from data.speller import Speller
from data.tokenization import TextTokenizer
from model.generate import passes
from trainer.distributed import World


class Prompt(NamedTuple):
    """What to answer, and for how long."""

    ids: list[int]
    """At least one."""
    new_tokens: int
    """Most of them."""
    stops: Sequence[str] = ()
    """The answer ends before the first of these."""
    temperature: float = 0.0
    top_p: float = 1.0


def answer(
    engine: Any,
    tokenizer: TextTokenizer,
    prompts: Sequence[Prompt],
    world: World,
    lockstep: bool = False,
    progress: Callable[[int], object] = lambda prompts: None,
) -> list[str]:
    """The answers, in the prompts' order, up to their stops; on every rank; collective.

    Args:
        engine: a decoder in evaluation mode, or an engine around one.
        tokenizer: of the model.
        prompts: the same on every rank.
        world: ranks that share the work.
        lockstep: run equally many passes on every rank.
        progress: called with the number of prompts that all ranks together have answered since.
    """
    order = sorted(range(len(prompts)), key=lambda place: (-prompts[place].new_tokens, -len(prompts[place].ids)))
    own: dict[int, str] = {}
    for first in range(0, len(order), world.size):
        dealt = order[first : first + world.size]
        if world.rank < len(dealt):
            place = dealt[world.rank]
            own[place] = _answer(engine, tokenizer, prompts[place], prompts[dealt[0]].new_tokens, world, lockstep)
        elif lockstep:
            _answer(engine, tokenizer, prompts[dealt[0]], prompts[dealt[0]].new_tokens, world, lockstep)
        progress(len(dealt))
    found: dict[int, str] = {}
    for part in world.gather_objects(own):
        found |= part
    return [found[place] for place in range(len(prompts))]


def _answer(engine: Any, tokenizer: TextTokenizer, prompt: Prompt, longest: int, world: World, lockstep: bool) -> str:
    """One answer; ``longest``: most new tokens of any rank."""
    sampling = torch.Generator(world.device).manual_seed(0)
    speller, text, ended = Speller(tokenizer, prompt.ids), "", False
    start = torch.tensor([prompt.ids], device=world.device)
    most = longest if lockstep else prompt.new_tokens
    made = passes(engine, start, most, prompt.temperature, prompt.top_p, generator=sampling)
    for count, one in enumerate(made, 1):
        token = int(one.chosen)
        if not ended:
            text += speller.add(token)
            ended = token == tokenizer.eos_id or count == prompt.new_tokens
            if ended:
                text += speller.rest()
            ended = ended or any(stop in text for stop in prompt.stops if stop)
        if not lockstep:
            if ended:
                break
        elif not int(world.sum(torch.tensor(int(not ended), device=world.device))):
            break
    ends = [text.find(stop) for stop in prompt.stops if stop and stop in text]
    return text[: min(ends)] if ends else text
