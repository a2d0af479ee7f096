"""Windows of tokens in, log-likelihoods out: what perplexity, the harness and tasks in training share.

Rows are sorted by length and cut into batches of a number of tokens, padding included; rows with the same inputs run
once. The batches are dealt out to the ranks after they are cut, so every row is computed in the same company whatever
the number of ranks, and all ranks get all scores. Every rank runs equally many passes, as ZeRO 3 needs it.

Routing is greedy, as in generation. Dimension letters: B rows, T tokens, S routed sites, n scored tokens of a row, N of
a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from model.flops import Routed, dense_flops, executed_flops
from trainer.distributed import ALONE, World


class Window(NamedTuple):
    """One row for the model: the last ``len(targets)`` of its predictions are scored."""

    inputs: list[int]
    """At least as many as ``targets``."""
    targets: list[int]


class WindowScore(NamedTuple):
    """A window's scored tokens."""

    nll: Tensor
    """Negative log-likelihoods in nats, fp32 [n], on the CPU."""
    hit: Tensor
    """Whether the target is the likeliest token, bool [n]."""

    @property
    def loglikelihood(self) -> float:
        """Sum over the tokens, nats."""
        return -float(self.nll.double().sum())


class Scorer:
    """Scores windows and counts what ran for them.

    Args:
        engine: a decoder in evaluation mode, or a DeepSpeed engine around one.
        batch_tokens: most tokens of a batch, padding included; a longer row is a batch of its own.
        world: ranks that share the work, and this one's device.
    """

    def __init__(self, engine: Any, batch_tokens: int, world: World = ALONE) -> None:
        if batch_tokens < 1:
            raise ValueError(f"a batch must have at least 1 token, got {batch_tokens}; raise --batch-tokens")
        self.engine, self.batch_tokens, self.world = engine, batch_tokens, world
        self.decoder: Decoder = getattr(engine, "module", engine)
        # Tokens, keys, scored tokens, tokens with padding; then for each site tokens and keys.
        self._counts = torch.zeros(4 + 2 * len(self.decoder.config.sites), dtype=torch.float64)

    def score(self, rows: Sequence[Window], progress: Callable[[int], object] = lambda rows: None) -> list[WindowScore]:
        """Scores of windows, in their order; collective.

        Args:
            rows: the same on every rank.
            progress: called with the number of rows that all ranks together have done since.
        """
        batches, size = self._batches(rows), self.world.size
        own: list[tuple[int, WindowScore]] = []
        counts = torch.zeros_like(self._counts)
        for first in range(0, len(batches), size):
            dealt = batches[first : first + size]
            if self.world.rank < len(dealt):
                found, counted = self._score_batch(rows, dealt[self.world.rank])
                own += found
                counts += counted
            else:  # every rank must run as many passes
                self._score_batch(rows, dealt[-1][-1:])
            progress(sum(len(same) for batch in dealt for same in batch))
        scores: dict[int, WindowScore] = {}
        for found, counted in self.world.gather_objects((own, counts)):
            scores |= dict(found)
            self._counts += counted
        return [scores[place] for place in range(len(rows))]

    def _batches(self, rows: Sequence[Window]) -> list[list[list[int]]]:
        """Batches of rows, longest first; a row is the places of all windows with its inputs."""
        same: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            same.setdefault(tuple(row.inputs), []).append(place)
        batches: list[list[list[int]]] = []
        longest = 0
        for inputs, places in sorted(same.items(), key=lambda entry: -len(entry[0])):
            full = not batches or (len(batches[-1]) + 1) * longest > self.batch_tokens
            # A batch of some size ends where padding would be a quarter of a row.
            if full or (4 * len(inputs) < 3 * longest and 4 * len(batches[-1]) * longest >= self.batch_tokens):
                batches.append([])
                longest = len(inputs)
            batches[-1].append(places)
        return batches

    @torch.no_grad()
    def _score_batch(
        self, rows: Sequence[Window], batch: list[list[int]]
    ) -> tuple[list[tuple[int, WindowScore]], Tensor]:
        """Scores by place, and what was counted."""
        inputs = [rows[places[0]].inputs for places in batch]
        longest, lengths = max(map(len, inputs)), torch.tensor([len(row) for row in inputs])
        tokens = torch.zeros(len(inputs), longest, dtype=torch.int64)  # padding comes last: nothing sees it
        for number, row in enumerate(inputs):
            tokens[number, : len(row)] = torch.tensor(row)
        windows = [(number, place) for number, places in enumerate(batch) for place in places]
        scored = [len(rows[place].targets) for _, place in windows]
        ends = [number * longest + len(inputs[number]) for number, _ in windows]
        places = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, scored, strict=True)])
        targets = torch.tensor([token for _, place in windows for token in rows[place].targets])
        device = self.world.device
        output = self.engine(tokens.to(device), targets.to(device), places=places.to(device), score=True)
        # The last candidate is the model itself: the vote where the late layers have one, else the final layer.
        nll, hit = output.scores.nll[-1].cpu(), output.scores.hit[-1].cpu()
        parts = zip(windows, nll.split(scored), hit.split(scored), strict=True)
        counts = self._count(lengths, output.routing.executed, sum(scored))
        return [(place, WindowScore(*found)) for (_, place), *found in parts], counts

    def _count(self, lengths: Tensor, executed: Tensor, scored: int) -> Tensor:
        """Counts of rows of ``lengths`` [B]; ``executed`` [S, B, T] may be longer than they are."""
        _, rows, longest = executed.shape
        seen = torch.arange(1, longest + 1)  # as many keys are seen at each place
        real = seen <= lengths[:, None]
        weights = torch.stack([real.double(), (real * seen).double()]).to(executed.device)
        sites = torch.einsum("sbt,kbt->ks", executed.double(), weights).flatten().cpu()
        whole = [int(lengths.sum()), int((real * seen).sum()), scored, rows * longest]
        return torch.cat([torch.tensor(whole, dtype=torch.float64), sites])

    @property
    def routed(self) -> Routed:
        """All that ran so far, context included and padding left out; on every rank."""
        tokens, keys, scored, _ = map(int, self._counts[:4].tolist())
        executed, attended = self._counts[4:].view(2, -1).tolist()
        return Routed(tokens, keys, executed, attended, scored)

    @property
    def padding(self) -> float:
        """Share of all computed tokens that only filled batches up."""
        tokens, _, _, computed = self._counts[:4].tolist()
        return 1 - tokens / computed if computed else 0.0

    @property
    def flops(self) -> tuple[float, float]:
        """Forward FLOPs that were executed so far, and those of the same rows without routers."""
        routed, model = self.routed, self.decoder.config
        dense = dense_flops(model, routed.tokens, routed.visible_keys, routed.head_tokens)
        return executed_flops(model, routed), dense


def require_causal(model: ModelConfig) -> None:
    """Raise ValueError for routers that look at later tokens."""
    if model.router is not None and not model.router.causal:
        raise ValueError(
            "router.kind expert_choice picks tokens by looking at later ones, so it gives no likelihood of a next "
            "token; use a causal kind: learned, random or stride"
        )
