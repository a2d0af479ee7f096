"""Evaluation of stage two: how each late layer, the ensemble, and an oracle do on a set of examples.

Candidates are the late layers alone, each through its own norm, the final one last, then the ensemble; without an
ensemble the final layer alone. The oracle is no model: on each token it takes the late layer that does best there. How
far it is below the best layer shows how much the layers complement each other.

Dimension letters: E examples, O most responses to choose from (1 without choices), N scored tokens of a batch, C
candidates and the oracle, k late layers, G token classes, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.decoder import DecoderOutput
from trainer.distributed import World
from trainer.step import forward_batch, to_device
from tune.batches import ExampleSet, Scored
from tune.config import TuneConfig

ENSEMBLE, ORACLE, ALL = "ensemble", "oracle", "all"


@dataclass(frozen=True)
class Accuracy:
    """A share of examples, and its binomial standard error."""

    share: float
    error: float


@dataclass(frozen=True)
class Candidate:
    """Results of one candidate, or of the oracle, on the examples.

    Attributes:
        name: ``layer-05``, ``ensemble`` or ``oracle``.
        loss: nats per token of the right responses.
        exact_match: examples where every token of the right response, its end included, is the most likely: greedy
            decoding gives exactly it. The oracle's: on every token some late layer has it.
        choice_accuracy: examples where the right response is the most likely; None without choices. The oracle's:
            some late layer chooses it.
        per_token_accuracy: the same with responses compared by nats per token, so that longer ones have no
            disadvantage.
        right: bool [E], by choice if there are choices, otherwise by exact match.
        right_per_token: bool [E], by :attr:`per_token_accuracy`; None without choices.
        alone: share of the final layer's wrong examples that this one gets right; 0 for the final layer.
    """

    name: str
    loss: float
    exact_match: Accuracy
    choice_accuracy: Accuracy | None
    per_token_accuracy: Accuracy | None
    right: Tensor
    right_per_token: Tensor | None
    alone: float

    @property
    def accuracy(self) -> Accuracy:
        """Choice accuracy if there are choices, otherwise exact match."""
        return self.exact_match if self.choice_accuracy is None else self.choice_accuracy


@dataclass(frozen=True)
class Agreement:
    """Shares of examples that every late layer gets right, only some, and none, by :attr:`Candidate.accuracy`."""

    every: float
    some: float
    none: float


@dataclass(frozen=True)
class VoteStatistics:
    """How the ensemble's router weighs the layers, over the tokens of right responses.

    Attributes:
        layers: names of the k late layers.
        classes: names of the G classes of predicted tokens that occur, then ``all``.
        tokens: int64 [G + 1], number of tokens of each class.
        weight: float64 [G + 1, k], mean weight.
        largest: float64 [G + 1, k], share of tokens on which the layer's weight is the largest.
        entropy: float64 [G + 1], mean entropy of the weights, nats.
    """

    layers: list[str]
    classes: list[str]
    tokens: Tensor
    weight: Tensor
    largest: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class ExamplesEvaluation:
    """One set of examples, evaluated.

    Attributes:
        name: of the set.
        examples: E.
        choices: O.
        fewest_choices: least number of choices in an example.
        tokens: of all right responses.
        candidates: the late layers, the final one last, then ensemble and oracle; without an ensemble the final layer.
        agreement: of the late layers; None without an ensemble.
        votes: the router's weights; None without an ensemble.
        not_finite: number, from 1, of the first example with a response for which some candidate's logits are not
            finite; 0 if there is none. Such a candidate's figures are NaN, and the example does not count as right.
    """

    name: str
    examples: int
    choices: int
    fewest_choices: int
    tokens: int
    candidates: list[Candidate]
    agreement: Agreement | None
    votes: VoteStatistics | None
    not_finite: int = 0

    @property
    def offered(self) -> str:
        """``4``, or ``2 to 4`` if examples have different numbers of choices."""
        return f"{self.choices}" if self.choices == self.fewest_choices else f"{self.fewest_choices} to {self.choices}"

    def sentence(self) -> str:
        """Loss and accuracy of the model, and with an ensemble those of the final layer and the oracle, in one line."""
        kind = "exact match" if self.choices == 1 else "choice accuracy"

        def described(candidate: Candidate) -> str:
            return f"{candidate.name} loss {candidate.loss:.4f}, {kind} {candidate.accuracy.share:.1%}"

        broken = f"; the logits of example {self.not_finite} are not finite" if self.not_finite else ""
        if self.votes is None:
            return described(self.candidates[0]) + broken
        *_, final, ensemble, oracle = self.candidates
        return f"{described(ensemble)} ({described(final)}; {described(oracle)}){broken}"


@torch.no_grad()
def evaluate_examples(
    engine: Any,
    example_set: ExampleSet,
    tokenizer_classes: tuple[list[str], Tensor],
    config: TuneConfig,
    world: World,
) -> ExamplesEvaluation:
    """Score every response of ``example_set`` with greedy routing; collective, with the same result on every rank.

    Args:
        engine: a decoder, or a DeepSpeed engine around one.
        tokenizer_classes: names, and int64 [V]: see :func:`tune.classes.token_classes`.
    """
    class_names, class_of = tokenizer_classes
    late = 1 if config.ensemble is None else config.ensemble.layers
    layers = config.model.last_layers(late)
    names = layers if config.ensemble is None else [*layers, ENSEMBLE, ORACLE]
    sums = _Sums(len(names), late, example_set, len(class_names), world.device)
    engine.eval()
    for host_batch, scored in example_set.scored_batches(world.rank, world.size, config.train.micro_batch_samples):
        batch = to_device(host_batch, world.device)
        output = forward_batch(engine, batch, noise_scale=0.0, score=True)
        sums.add(output, scored, class_of)
    engine.train()
    for part in (sums.nll, sums.misses, sums.tokens, sums.votes):
        world.all_reduce_sum(part)
    right = torch.as_tensor(example_set.right, device=world.device)
    offered = torch.as_tensor(example_set.choices, device=world.device)
    candidates, agreement = _judge(sums, right, offered, names, late)
    broken = (~sums.nll.isfinite()).any(0).any(-1).nonzero().flatten().tolist()
    return ExamplesEvaluation(
        name=example_set.name,
        examples=example_set.examples,
        choices=example_set.most_choices,
        fewest_choices=int(example_set.choices.min()),
        tokens=int(_of(sums.tokens, right).sum()),
        candidates=candidates,
        agreement=None if config.ensemble is None else agreement,
        votes=None if config.ensemble is None else _vote_statistics(sums.votes.cpu(), layers, class_names),
        not_finite=broken[0] + 1 if broken else 0,
    )


class _Sums:
    """Sums over tokens, on the device: float64, so that the number of ranks does not affect the result.

    Attributes:
        nll: [C, E, O], of each response.
        misses: [C, E, O], its tokens that are not the most likely.
        tokens: [E, O].
        votes: [G, 2 k + 2], over tokens of right responses: weights, whether they are the largest, entropy, and 1.
    """

    def __init__(self, rows: int, late: int, example_set: ExampleSet, classes: int, device: torch.device):
        self.late = late
        responses = (example_set.examples, example_set.most_choices)
        self.nll = torch.zeros(rows, *responses, dtype=torch.float64, device=device)
        self.misses, self.tokens = torch.zeros_like(self.nll), torch.zeros_like(self.nll[0])
        self.votes = torch.zeros(classes, 2 * late + 2, dtype=torch.float64, device=device)

    def add(self, output: DecoderOutput, scored: Scored, class_of: Tensor) -> None:
        """Add one forward pass; ``class_of`` is int64 [V]."""
        assert output.scores is not None
        device, choices = self.nll.device, self.tokens.shape[1]
        nll, hit = output.scores.nll.double(), output.scores.hit
        response = torch.as_tensor(scored.example * choices + scored.choice, device=device)
        if output.vote is not None:
            late = slice(0, self.late)
            nll = torch.cat((nll, nll[late].amin(dim=0, keepdim=True)))
            hit = torch.cat((hit, hit[late].any(dim=0, keepdim=True)))
            right = torch.as_tensor(scored.right, device=device)
            classes = class_of[torch.as_tensor(scored.token)].to(device)
            self.votes.index_add_(0, classes[right], _vote_row(output.vote.weights[right].double()))
        self.nll.flatten(1).index_add_(1, response, nll)
        self.misses.flatten(1).index_add_(1, response, (~hit).double())
        self.tokens.flatten().index_add_(0, response, torch.ones_like(nll[0]))


def _vote_row(weights: Tensor) -> Tensor:
    """Weights [N, k] -> [N, 2 k + 2]: see :class:`_Sums`."""
    largest = F.one_hot(weights.argmax(dim=-1), weights.shape[-1])
    entropy = -torch.xlogy(weights, weights).sum(dim=-1, keepdim=True)
    return torch.cat((weights, largest, entropy, torch.ones_like(entropy)), dim=-1)


def _judge(
    sums: _Sums, right: Tensor, offered: Tensor, names: list[str], late: int
) -> tuple[list[Candidate], Agreement]:
    """From sums over all ranks, and each example's right response and number of choices, int64 [E] each."""
    absent = torch.arange(sums.tokens.shape[1], device=offered.device) >= offered[:, None]
    assert torch.equal(sums.tokens == 0, absent), "a response was not scored"
    loss = _of(sums.nll, right).sum(-1) / _of(sums.tokens, right).sum()
    finite = sums.nll.isfinite().all(-1)
    exact = (_of(sums.misses, right) == 0) & finite
    chosen = per_token = None
    if sums.tokens.shape[1] > 1:
        costs = (sums.nll, sums.nll / sums.tokens.clamp(min=1))
        chosen, per_token = (_chosen(c.masked_fill(absent, math.inf), right, names, late) & finite for c in costs)
    answers = (exact if chosen is None else chosen).cpu()
    beside = answers & ~answers[late - 1]
    wrong = (~answers[late - 1]).sum().clamp(min=1)
    known = finite.all(-1).tolist()
    candidates = [
        Candidate(
            name,
            float(loss[row]),
            _accuracy(exact[row], known[row]),
            None if chosen is None else _accuracy(chosen[row], known[row]),
            None if per_token is None else _accuracy(per_token[row], known[row]),
            answers[row],
            None if per_token is None else per_token[row].cpu(),
            float(beside[row].sum() / wrong),
        )
        for row, name in enumerate(names)
    ]
    layers_right = answers[:late].sum(dim=0)
    every, none = (float((layers_right == count).double().mean()) for count in (late, 0))
    return candidates, Agreement(every, float(((layers_right > 0) & (layers_right < late)).double().mean()), none)


def _chosen(costs: Tensor, right: Tensor, names: list[str], late: int) -> Tensor:
    """Whether the right response costs least, [C, E, O] -> bool [C, E]; for the oracle, with any late layer."""
    chosen = costs.argmin(dim=-1) == right
    if names[-1] == ORACLE:
        chosen[-1] = chosen[:late].any(dim=0)
    return chosen


def _of(values: Tensor, right: Tensor) -> Tensor:
    """[..., E, O] -> [..., E], the right response's."""
    return values[..., torch.arange(len(right), device=right.device), right]


def _accuracy(correct: Tensor, known: bool) -> Accuracy:
    """Share of bool [E] and its error; NaN if not ``known``."""
    share = float(correct.double().mean()) if known else math.nan
    return Accuracy(share, math.sqrt(share * (1 - share) / len(correct)))


def _vote_statistics(votes: Tensor, layers: list[str], classes: list[str]) -> VoteStatistics:
    """From sums float64 [G, 2 k + 2]; classes that do not occur are left out."""
    occurs = votes[:, -1] > 0
    rows = torch.cat((votes[occurs], votes.sum(dim=0, keepdim=True)))
    weight, largest, entropy, _ = (rows / rows[:, -1:]).split([len(layers), len(layers), 1, 1], dim=-1)
    occurring = [name for name, kept in zip(classes, occurs.tolist(), strict=True) if kept]
    return VoteStatistics(layers, [*occurring, ALL], rows[:, -1].long(), weight, largest, entropy.squeeze(-1))
