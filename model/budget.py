"""The compute budget: what keeps the learned routers at their target density.

The regulariser of Zeng et al. 2023 (section 3.3) is ``c * sum_l (r_l - P)^2``, with r_l a layer's mean hard gate and
the straight-through gradient. Its gradient is a **price** on executing a token at a site,

    per_layer    price_s = 2 c (r_s - P)                           penalty  c sum_s (r_s - P)^2
    global       price_s = 2 c (R - P) S f_s,  R = sum_s f_s r_s   penalty  c S (R - P)^2

with f_s the site's share of the skippable FLOPs and S the number of sites. The step's loss then has the term
``sum_s price_s r_s`` with the price as a constant: the same gradient.

The r in the price is the density of the previous optimiser step, over all ranks and micro-batches, not that of the
current micro-batch. So the error is that of the global batch for any number of ranks and any accumulation split, and
the forward pass needs no collective. Density moves by a few thousandths a step; in the first step the price is 0.
Tokens that a capacity dropped count in r: the budget brings the router down to its density, the capacity only bounds
the cost until then.

``controller: adaptive`` adds an integral term to the price, ``I += rate (r - P)`` after every step: dual ascent on
the constraint r = P, which ends at the price that meets the target, whatever c is.

``controller: quantile`` sets no price. A token executes where its margin, noise included, reaches its site's threshold

    t_s = m_s + d_s (z(1 - P) + k_s)                               k_s += g_s (r_s - P) after every step

with m_s and d_s the mean and the standard deviation of the site's margins, z the normal quantile function, and k_s a
correction for how their true distribution differs, with a gain g_s of at most a half. (A threshold at a running
quantile of the scores: Expert Threshold, arXiv:2603.11535; this estimate of it is ours.) The router's gradient is what
a token gains by executing, and the target is met from the second step on. While the target is 1 the threshold is minus
infinity. The soft gate, which gives routers their gradient, is centred on the threshold, but no further than d_s from
m_s, so that they also learn while all tokens execute. m_s and d_s are averages over the last few steps, over all tokens
of all ranks: the same for any split of the batch.

Most of that gradient is common to all tokens of a site: executing helps. It would move all margins together, and the
threshold after them. So a router learns as if it read its input minus its mean over those steps: only from what tells
tokens apart. In the first step, when there is no mean yet, it learns nothing.

Dimension letters: S routed sites, D width.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import Capacity, ModelConfig
from model.flops import site_shares
from model.router import Centres
from model.schedules import Progress

_MEMORY = 0.5
"""quantile: decay per step of the running moments of margins. Early in training, margins move by a good part of a
standard deviation a step; a longer memory would lag."""
_GAIN, _LEAST_GAIN = 0.5, 0.05
"""quantile: standard deviations by which a threshold moves in one step per unit of density error, most and least:
halved when the error changes sign, so that a threshold settles in a narrow cluster of margins, else raised again."""


class MarginStatistics(NamedTuple):
    """What ``controller: quantile`` follows, over all tokens of a step, on all ranks.

    Attributes:
        moments: mean and mean square of each site's margins, fp64 [2, S].
        input_mean: mean of what each site's router read, fp64 [S, D].
    """

    moments: Tensor
    input_mean: Tensor


class Budget:
    """Prices per routed site, and the state that they come from.

    Args:
        config: the model's config. For a dense model, or routers without weights, prices are always 0.
        sequence_tokens: window length, for the sites' FLOP shares and the capacity.
        device: where prices live.
    """

    def __init__(self, config: ModelConfig, sequence_tokens: int, device: torch.device | str = "cpu"):
        self.router, self.sequence_tokens = config.router, sequence_tokens
        self.sites = len(config.sites)
        self.active = self.router is not None and self.router.learned
        shares = site_shares(config, sequence_tokens) if self.sites else []
        self._shares = torch.tensor(shares, dtype=torch.float32, device=device)
        self._error = torch.zeros(self.sites, dtype=torch.float32, device=device)
        self._integral = torch.zeros(self.sites, dtype=torch.float32, device=device)
        self.follows_margins = self.active and self.router is not None and self.router.budget.controller == "quantile"
        self._gain = torch.full_like(self._error, _GAIN)
        self._seen: MarginStatistics | None = None

    def target(self, progress: Progress) -> float:
        """Density asked for at ``progress``: 1, then a line down to P."""
        if self.router is None:
            return 1.0
        return self.router.budget.target(self.router.density, progress) if self.active else self.router.density

    def capacity(self, progress: Progress) -> Capacity | None:
        """How many tokens of a window a site computes at ``progress``; None where shapes depend on the decisions."""
        if self.router is None:
            return None
        return self.router.capacity(self.sequence_tokens, self.target(progress))

    @property
    def seen_margins(self) -> bool:
        """Whether a step has been observed for thresholds to follow."""
        return self._seen is not None

    def thresholds(self, progress: Progress) -> tuple[Tensor, Centres] | tuple[None, None]:
        """Thresholds, fp32 [S], and centres of soft gates for this step; None where margins are compared with 0."""
        if not self.follows_margins:
            return None, None
        if self._seen is None:
            return torch.full_like(self._error, -math.inf), Centres(torch.zeros_like(self._error), None)
        (mean, square), target = self._seen.moments, self.target(progress)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        offset = (NormalDist().inv_cdf(1 - target) if target < 1 else -math.inf) + self._integral.double()
        threshold = torch.where(deviation > 0, mean + deviation * offset, -math.inf)
        centre = mean + deviation * offset.clamp(-1, 1)
        return threshold.float(), Centres(centre.float(), self._seen.input_mean.float())

    def prices(self) -> Tensor:
        """Nats per unit of density for this step, fp32 [S]; the gradient of the penalty at the last step's density."""
        if not self.active or self.follows_margins:
            return torch.zeros_like(self._error)
        assert self.router is not None
        return self._scale() * (2 * self.router.budget.coefficient * self._error + self._integral)

    def penalty(self, density: Tensor, progress: Progress) -> Tensor:
        """The regulariser's value for the wanted densities [S] of a whole step, in nats: a scalar, for the log."""
        if not self.active or self.follows_margins:
            return torch.zeros((), device=density.device)
        assert self.router is not None
        error = self._errors(density, progress)
        return self.router.budget.coefficient * (self._scale() * error.square()).sum()

    def observe(self, density: Tensor, progress: Progress, seen: MarginStatistics | None = None) -> None:
        """Update the state from the step just done, over all ranks and micro-batches.

        Args:
            density: wanted by each site, [S].
            progress: at that step.
            seen: what thresholds follow; quantile only.
        """
        if not self.active:
            return
        assert self.router is not None
        before, self._error = self._error, self._errors(density.detach().float(), progress)
        if self.follows_margins:
            assert seen is not None
            if self._seen is None:
                self._seen = seen
                return
            if self.target(progress) < 1:
                turned = self._error * before < 0
                self._gain = torch.where(turned, self._gain / 2, self._gain * 1.2).clamp(_LEAST_GAIN, _GAIN)
                self._integral = (self._integral + self._gain * self._error).clamp(-3, 3)
            self._seen = MarginStatistics(
                *(_MEMORY * old + (1 - _MEMORY) * new for old, new in zip(self._seen, seen, strict=True))
            )
            return
        # Only once the target is constant: while it is 1, noise keeps the density below it and I would wind up.
        if self.router.budget.controller == "adaptive" and progress.step >= self.router.budget.reached(progress):
            self._integral = self._integral + self.router.budget.adaptive_rate * self._error

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs."""
        state: dict[str, Any] = {"error": self._error.cpu(), "integral": self._integral.cpu()}
        state["controller"] = None if self.router is None else self.router.budget.controller
        if self._seen is not None:
            state |= {"gain": self._gain.cpu()} | {name: each.cpu() for name, each in self._seen._asdict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        From another controller, as in a fork, only the error is restored: the integral has another unit.
        """
        for name in ("error", "integral"):
            if state[name].shape != (self.sites,):
                raise ValueError(
                    f"the checkpoint's budget has {state[name].numel()} routed sites, but this model has {self.sites}; "
                    "resume with the router block that the run was started with"
                )
        self._error = state["error"].to(self._error.device)
        own = None if self.router is None else self.router.budget.controller
        before = "quantile" if "moments" in state else own  # older versions did not store it
        if state.get("controller", before) != own:
            return
        self._integral = state["integral"].to(self._integral.device)
        if self.follows_margins and "moments" in state:
            if missing := [name for name in MarginStatistics._fields if name not in state]:
                raise ValueError(
                    f"the checkpoint's budget state lacks {', '.join(missing)}, from which this version sets the "
                    "thresholds: an older version saved it; continue with the commit named in its manifest, or start a "
                    "new run from its weights with init"
                )
            self._gain = state["gain"].to(self._error.device)
            self._seen = MarginStatistics(*(state[name].to(self._error.device) for name in MarginStatistics._fields))

    def _errors(self, density: Tensor, progress: Progress) -> Tensor:
        assert self.router is not None
        if self.router.budget.kind == "global":
            density = (self._shares * density).sum().expand(self.sites)
        return density - self.target(progress)

    def _scale(self) -> Tensor:
        assert self.router is not None
        if self.router.budget.kind == "global":
            return self._shares * self.sites
        return torch.ones_like(self._shares)
