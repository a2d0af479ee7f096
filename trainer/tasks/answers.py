"""Generating a model's answers to prompts, on one rank or many.

Greedy prompts of similar length are batched; each rank takes one batch per round. With ``lockstep`` (ZeRO 3, where a
pass needs all ranks) every rank continues until the longest answer of the round is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from data.detokenizer import Detokenizer
from data.tokenization import TextTokenizer
from model.generate import passes
from trainer.distributed import World

BATCH = 16
"""Most prompts in a batch."""
SHORTEST = 0.5
"""Least length of a prompt in a batch, relative to the longest one."""


class Prompt(NamedTuple):
    """What to answer, and how."""

    ids: list[int]
    """Token ids, at least one."""
    new_tokens: int
    """Most tokens to generate."""
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
) -> list[str | None]:
    """The answers, in the prompts' order, up to their stops; None if logits were not finite; on every rank.

    Collective.

    Args:
        engine: a decoder in evaluation mode, or an engine around one.
        tokenizer: the model's.
        prompts: the same on every rank.
        world: ranks that share the work.
        lockstep: run the same number of passes on every rank.
        progress: called with the number of prompts that all ranks have answered since the last call.
    """
    batches = _batches(prompts)
    own: dict[int, str | None] = {}
    for first in range(0, len(batches), world.size):
        dealt = batches[first : first + world.size]
        longest = max(prompts[place].new_tokens for batch in dealt for place in batch)
        batch = dealt[world.rank] if world.rank < len(dealt) else dealt[0] if lockstep else []
        texts = _answers(engine, tokenizer, [prompts[place] for place in batch], longest, world, lockstep)
        if world.rank < len(dealt):
            own |= zip(batch, texts, strict=True)
        progress(sum(map(len, dealt)))
    found: dict[int, str | None] = {}
    for part in world.all_gather_objects(own):
        found |= part
    return [found[place] for place in range(len(prompts))]


def _batches(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Batches of prompt indices, those with the most tokens to generate first.

    At most ``BATCH`` of similar length, because padding runs through every layer; sampled prompts have a batch each, so
    that an answer does not depend on its neighbours.
    """
    order = sorted(range(len(prompts)), key=lambda place: (-prompts[place].new_tokens, -len(prompts[place].ids)))
    batches: list[list[int]] = []
    for place in order:
        prompt, first = prompts[place], prompts[batches[-1][0]] if batches else None
        if (
            first is None
            or len(batches[-1]) == BATCH
            or prompt.temperature
            or first.temperature
            or prompt.new_tokens != first.new_tokens
            or len(prompt.ids) < SHORTEST * len(first.ids)
        ):
            batches.append([])
        batches[-1].append(place)
    return batches


class _Answer:
    """An answer while it is generated."""

    def __init__(self, prompt: Prompt, tokenizer: TextTokenizer) -> None:
        self._prompt, self._eos_id = prompt, tokenizer.eos_id
        self._detokenizer = Detokenizer(tokenizer, prompt.ids)
        self._text, self._tokens, self.ended, self._finite = "", 0, False, True

    def add(self, token: int, finite: bool) -> None:
        """Add the next token, and whether its logits were finite; ignored after the end."""
        if self.ended:
            return
        self._finite &= finite
        self._tokens += 1
        self._text += self._detokenizer.add(token)
        self.ended = token == self._eos_id or self._tokens == self._prompt.new_tokens
        if self.ended:
            self._text += self._detokenizer.rest()
        self.ended = self.ended or any(stop in self._text for stop in self._prompt.stops if stop)

    @property
    def text(self) -> str | None:
        """The answer up to the first stop; None if logits were not finite."""
        if not self._finite:
            return None
        ends = [self._text.find(stop) for stop in self._prompt.stops if stop and stop in self._text]
        return self._text[: min(ends)] if ends else self._text


def _answers(
    engine: Any, tokenizer: TextTokenizer, prompts: Sequence[Prompt], longest: int, world: World, lockstep: bool
) -> list[str | None]:
    """The answers to one batch; ``longest``: most new tokens of any rank's batch."""
    if not prompts:
        return []
    width, first = max(len(prompt.ids) for prompt in prompts), prompts[0]
    padding = [width - len(prompt.ids) for prompt in prompts]
    start = torch.tensor([[0] * pad + list(p.ids) for pad, p in zip(padding, prompts, strict=True)])
    made = passes(
        engine, start.to(world.device), longest if lockstep else first.new_tokens, first.temperature, first.top_p,
        generator=torch.Generator(world.device).manual_seed(0), padding=torch.tensor(padding, device=world.device),
    )  # fmt: skip
    answers = [_Answer(prompt, tokenizer) for prompt in prompts]
    for one in made:
        for written, token, finite in zip(answers, one.chosen.tolist(), one.finite.tolist(), strict=True):
            written.add(token, finite)
        going = any(not written.ended for written in answers)
        if not (int(world.all_reduce_sum(torch.tensor(int(going), device=world.device))) if lockstep else going):
            break
    return [written.text for written in answers]
