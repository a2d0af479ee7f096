"""Log-likelihoods of windows of tokens, for perplexity, the harness and tasks during training.

What rows share is computed once: identical rows, and common prefixes, such as a question before its choices:

    a question           choice 1             first the questions of a batch, up to the length of the shortest, into a
                         choice 2             cache; then, from there on, all their choices
    another question ..  ..  choice 1         .. is left of a question for the second pass
                         ..  choice 2

Sorted by length, rows are split into batches of a number of tokens, padding included. Batches are formed before they
are distributed over the ranks, so a row's batch does not depend on the number of ranks, and all ranks get all scores.
In an engine every rank runs the same number of passes, as ZeRO 3 requires, and prefixes are not shared.

Routing is greedy, as in generation. Dimension letters: G groups of rows with a common prefix, B rows, P tokens of a
prefix, T tokens, S routed sites, n scored tokens of a row, N of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.tokenization import common_start
from model.cache import KVCache
from model.decoder import Decoder
from model.flops import Routed, dense_flops, executed_flops
from trainer.distributed import ALONE, World


class Window(NamedTuple):
    """One row for the model: the last ``len(targets)`` of its predictions are scored."""

    inputs: list[int]
    """Token ids, at least as many as ``targets``."""
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


class _Batch(NamedTuple):
    """Groups of rows that run together; a row is the list of the indices of all windows with the same inputs."""

    groups: list[list[list[int]]]
    shared: int
    """P, length of the prefix that the rows of each group share and that runs once per group; 0 for none."""


NO_LIKELIHOOD = "it gives no likelihood of a next token"
"""Why a model that looks at later tokens is not scored."""
_LEAST_SHARED = 16
"""Shortest prefix, in tokens, that is worth a pass of its own."""


class Scorer:
    """Scores windows and counts what was executed for them.

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
            progress: called with the number of rows that all ranks have scored since the last call.
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
            elif self.engine is not self.decoder:  # every rank must run the same number of passes
                self._score_batch(rows, _Batch([dealt[-1].groups[-1][-1:]], 0))
            progress(sum(len(same) for batch in dealt for group in batch.groups for same in group))
        scores: dict[int, WindowScore] = {}
        for found, counted in self.world.all_gather_objects((own, counts)):
            scores |= dict(found)
            self._counts += counted
        return [scores[place] for place in range(len(rows))]

    def _batches(self, rows: Sequence[Window]) -> list[_Batch]:
        """All rows: first groups with a shared prefix, the longest prefix first, then the others, the longest first."""
        batches: list[_Batch] = []
        longest = 0
        for shared, group in sorted(self._groups(rows), key=lambda g: (-g[0], -len(rows[g[1][0][0]].inputs))):
            length = max(len(rows[places[0]].inputs) for places in group)
            together = max(longest, length)
            before = batches[-1] if batches else _Batch([], 0)
            count = len(group) + sum(map(len, before.groups))
            tokens = (len(before.groups) + 1) * shared + count * (together - shared)
            # Once a quarter full, a batch ends where padding, or the rest of a cut prefix, would be over a quarter.
            uneven = 4 * (shared or length) < 3 * (before.shared if shared else longest)
            full = tokens > self.batch_tokens or (uneven and 4 * tokens >= self.batch_tokens)
            if full or not before.groups or bool(shared) != bool(before.shared):
                batches.append(_Batch([group], shared))
                longest = length
            else:
                batches[-1] = _Batch([*before.groups, group], shared)
                longest = together
        return batches

    def _groups(self, rows: Sequence[Window]) -> list[tuple[int, list[list[int]]]]:
        """Groups of rows with a common prefix, and its length before anything is scored; 0 for a row by itself."""
        same: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            same.setdefault(tuple(row.inputs), []).append(place)
        groups: list[tuple[int, list[list[int]]]] = []
        for inputs, places in same.items():
            free = len(inputs) - max(len(rows[place].targets) for place in places)
            if groups and self.engine is self.decoder:
                shared, group = groups[-1]
                common = min(free, shared, common_start(inputs, rows[group[0][0]].inputs))
                if common >= max(_LEAST_SHARED, shared // 2):
                    groups[-1] = (common, [*group, places])
                    continue
            groups.append((free, [places]))
        return [(shared if len(group) > 1 else 0, group) for shared, group in groups]

    @torch.no_grad()
    def _score_batch(self, rows: Sequence[Window], batch: _Batch) -> tuple[list[tuple[int, WindowScore]], Tensor]:
        """Scores by the window's index, and what was counted."""
        shared = batch.shared
        same = [places for group in batch.groups for places in group]
        inputs = [rows[places[0]].inputs for places in same]
        cache, counts = None, torch.zeros_like(self._counts)
        if shared:
            beginnings = [rows[group[0][0]].inputs[:shared] for group in batch.groups]
            cache, counts = self._begin(beginnings, [len(group) for group in batch.groups], max(map(len, inputs)))
        lengths = torch.tensor([len(row) - shared for row in inputs])
        longest = int(lengths.max())
        tokens = torch.zeros(len(inputs), longest, dtype=torch.int64)  # padding comes last: no token attends to it
        for number, row in enumerate(inputs):
            tokens[number, : len(row) - shared] = torch.tensor(row[shared:])
        windows = [(number, place) for number, places in enumerate(same) for place in places]
        scored = [len(rows[place].targets) for _, place in windows]
        ends = [number * longest + int(lengths[number]) for number, _ in windows]
        places = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, scored, strict=True)])
        targets = torch.tensor([token for _, place in windows for token in rows[place].targets])
        output = self._run(tokens, targets, places, cache)
        # The last candidate is the model itself: the vote where the late layers have one, else the final layer.
        nll, hit = output.scores.nll[-1].cpu(), output.scores.hit[-1].cpu()
        parts = zip(windows, nll.split(scored), hit.split(scored), strict=True)
        counts = counts + self._count(lengths, output.routing.executed, sum(scored), shared)
        return [(place, WindowScore(*found)) for (_, place), *found in parts], counts

    def _begin(self, beginnings: list[list[int]], times: list[int], longest: int) -> tuple[KVCache, Tensor]:
        """Run G prefixes of P tokens; return a cache with each repeated ``times`` times and room for ``longest``."""
        config, device, dtype = self.decoder.config, self.world.device, self.decoder.embed_tokens.weight.dtype
        once = KVCache(config, len(beginnings), len(beginnings[0]), device, dtype)
        nothing = torch.zeros(0, dtype=torch.int64)
        output = self._run(torch.tensor(beginnings), nothing, nothing, once)
        lengths = torch.full((len(beginnings),), once.length)
        cache = KVCache(config, sum(times), longest, device, dtype)
        cache.repeat(once, torch.tensor(times, device=device))
        return cache, self._count(lengths, output.routing.executed, 0)

    def _run(self, tokens: Tensor, targets: Tensor, places: Tensor, cache: KVCache | None) -> Any:
        device = self.world.device
        return self.engine(tokens.to(device), targets.to(device), places=places.to(device), score=True, cache=cache)

    def _count(self, lengths: Tensor, executed: Tensor, scored: int, past: int = 0) -> Tensor:
        """Counts of rows of ``lengths`` [B] after ``past`` tokens; ``executed`` [S, B, T] may be longer."""
        _, rows, longest = executed.shape
        steps = torch.arange(1, longest + 1)
        real, seen = steps <= lengths[:, None], steps + past  # how many keys each position sees
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
        """Share of padding among all computed tokens."""
        tokens, _, _, computed = self._counts[:4].tolist()
        return 1 - tokens / computed if computed else 0.0

    @property
    def flops(self) -> tuple[float, float]:
        """Forward FLOPs that were executed so far, and those of the same rows without routers."""
        routed, model = self.routed, self.decoder.config
        dense = dense_flops(model, routed.tokens, routed.visible_keys, routed.head_tokens)
        return executed_flops(model, routed), dense
