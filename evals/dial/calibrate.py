"""Thresholds that make a trained decoder execute a given share of its tokens.

A learned router executes a token whose margin (execute logit minus skip logit) reaches its site's threshold: as
trained, 0 or what a quantile controller ended with. With d_s the density of site s as trained and ``mean`` their plain
mean over the sites (the ``density`` of the training metrics), a mean density rho gives each site the target

    rho <= mean    d_s * rho / mean                             all in proportion
    rho >= mean    d_s + (1 - d_s) * (rho - mean) / (1 - mean)  what is skipped, in proportion

so the trained point is one of the settings, and at 1 every site executes everything.

A site's threshold is a quantile of its margins, and these depend on what the sites before it execute. So the windows
are run with the current thresholds, all thresholds are set again, and so on. The first site's margins depend on no
threshold: it is right from the start, the second after one pass, the last of S after S - 1. So S passes make it exact;
it ends earlier once another pass would move no site's density by more than ``TOLERANCE``, which takes three or four.

Margins can be equal: those of a first layer are a function of the token alone, and a frequent token is a few percent
of a text. A threshold never splits such a cluster, which rounding would split differently in a full pass and in
decoding: it lies in the nearest gap, and the density is as close as gaps allow.

Dimension letters: S routed sites, N tokens of all windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import Batch
from model.decoder import Decoder
from trainer.step import forward_batch, to_device
from trainer.tally import Counter, Tally

TOLERANCE = 1e-3
"""Largest error of a site's density when calibration ends early."""
_GAP = 1e-5
"""Margins closer than this count as equal: about ten times the effect of fp32 rounding."""


@dataclass(frozen=True)
class Measured:
    """One pass over some windows.

    Attributes:
        tally: loss, densities and what ran.
        margins: fp32 [S, N], on the CPU.
    """

    tally: Tally
    margins: Tensor


@torch.no_grad()
def measure(decoder: Decoder, batches: Sequence[Batch], thresholds: Tensor | None = None) -> Measured:
    """Run ``decoder``, in evaluation mode and with learned routers, at ``thresholds`` fp32 [S] (else its own)."""
    device = decoder.embed_tokens.weight.device
    counter, margins = Counter(len(decoder.config.sites), device), []
    for host_batch in batches:
        batch = to_device(host_batch, device)
        output = forward_batch(decoder, batch, thresholds=thresholds)
        counter.add(output, batch.targets)
        assert output.routing.margins is not None
        margins.append(output.routing.margins.flatten(1).float().cpu())
    return Measured(counter.tally(), torch.cat(margins, dim=1))


def site_targets(trained: Sequence[float], density: float) -> list[float]:
    """Each site's target for a mean ``density``, given the densities as trained; the formula at the top."""
    mean = sum(trained) / len(trained)
    if density <= mean:
        return [own * density / mean for own in trained]
    return [min(own + (1 - own) * (density - mean) / (1 - mean), 1.0) for own in trained]


def calibrate(
    decoder: Decoder, batches: Sequence[Batch], trained: Measured, density: float, tolerance: float = TOLERANCE
) -> tuple[Tensor, Measured]:
    """Thresholds fp32 [S] for a mean ``density`` over ``batches``, and the pass that was made with them.

    Args:
        decoder: in evaluation mode.
        batches: the calibration windows; run at most S times.
        trained: the pass over them at the decoder's own thresholds.
        density: above 0 and at most 1; at 1 the thresholds are minus infinity.
        tolerance: of each site's density, for an early end; 0 for none.
    """
    targets, sites = site_targets(trained.tally.density, density), len(trained.margins)
    if density == 1:
        thresholds = torch.full((sites,), -math.inf)
        return thresholds, measure(decoder, batches, thresholds)
    thresholds = _quantiles(trained.margins, targets)
    for _ in range(sites - 1):
        seen = measure(decoder, batches, thresholds)
        better = _quantiles(seen.margins, targets)
        moved = (seen.margins >= better[:, None]).double().mean(1) - torch.tensor(seen.tally.density)
        if moved.abs().max() <= tolerance:
            return thresholds, seen
        thresholds = better
    return thresholds, measure(decoder, batches, thresholds)


def _quantiles(margins: Tensor, shares: Sequence[float]) -> Tensor:
    """fp32 [S]: thresholds that a share of each site's margins [S, N] reaches."""
    return torch.tensor([_quantile(site, share) for site, share in zip(margins, shares, strict=True)])


def _quantile(margins: Tensor, share: float) -> float:
    """A threshold that about ``share`` of ``margins`` [N] reaches: 0 if it will do, else the middle of the gap."""
    ranked = margins.sort(descending=True).values
    count = len(ranked)
    gaps = (ranked[:-1] - ranked[1:] >= _GAP).nonzero().squeeze(1) + 1
    places = torch.cat((torch.tensor([0]), gaps, torch.tensor([count])))  # how many execute at each possible cut
    executed = int(places[(places - share * count).abs().argmin()])
    inside = float(ranked[executed - 1]) if executed else math.inf
    outside = float(ranked[executed]) if executed < count else -math.inf
    if outside < 0 <= inside:
        return 0.0
    if not executed:
        return outside + _GAP
    return (inside + outside) / 2 if executed < count else inside - _GAP
