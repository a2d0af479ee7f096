"""The compute budget: what holds the learned routers at their density.

The regulariser of Zeng et al. 2023 (section 3.3) is ``c * sum_l (r_l - P)^2``, with r_l a layer's mean hard gate and
the straight-through gradient. Its gradient is a **price** on executing a token at a site,

    per_layer    price_s = 2 c (r_s - P)                           penalty  c sum_s (r_s - P)^2
    global       price_s = 2 c (R - P) S f_s,  R = sum_s f_s r_s   penalty  c S (R - P)^2

with f_s the site's share of the skippable FLOPs and S the number of sites. The step's loss then holds
``sum_s price_s r_s`` with the price as a constant: the same gradient.

The r in the price is the density of the optimiser step before, over all ranks and micro-batches, not that of the
micro-batch in hand. So the error is that of the global batch whatever the number of ranks and the accumulation split,
and the forward pass needs no collective. Density moves by a few thousandths a step; the first step is free. Tokens
that a router wants to execute and for which a capacity had no room are counted in r: the budget brings the router down
to its density, the capacity only bounds the cost until then.

``controller: adaptive`` adds an integral term to the price, ``I += rate (r - P)`` after every step: dual ascent on
the constraint r = P, which ends at the price that meets the target, whatever c is.

Dimension letters: S routed sites.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.flops import site_shares


class Budget:
    """Prices per routed site, and the state that they come from.

    Args:
        config: the model's config. A budget of a dense model, or of routers without weights, never asks a price.
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

    def target(self, progress: float) -> float:
        """Density asked for at ``progress``, the share of training steps done: 1, then a line down to P."""
        if self.router is None:
            return 1.0
        budget = self.router.budget
        if not self.active or progress >= budget.reach_by:
            return self.router.density
        if progress < budget.dense_until:
            return 1.0
        done = (progress - budget.dense_until) / (budget.reach_by - budget.dense_until)
        return 1.0 + (self.router.density - 1.0) * done

    def capacity_tokens(self, progress: float) -> int | None:
        """Most tokens of a window that a site may execute at ``progress``; None where all may."""
        if self.router is None:
            return None
        return self.router.capacity_tokens(self.sequence_tokens, self.target(progress))

    def prices(self) -> Tensor:
        """Nats per unit of density for this step, fp32 [S]; the gradient of the penalty at the last step's density."""
        if not self.active:
            return self._error
        assert self.router is not None
        return self._scale() * (2 * self.router.budget.coefficient * self._error + self._integral)

    def penalty(self, density: Tensor, progress: float) -> Tensor:
        """The regulariser's value for the wanted densities [S] of a whole step, in nats: a scalar, for the log."""
        if not self.active:
            return torch.zeros((), device=density.device)
        assert self.router is not None
        error = self._errors(density, progress)
        return self.router.budget.coefficient * (self._scale() * error.square()).sum()

    def observe(self, density: Tensor, progress: float) -> None:
        """Take in the wanted densities [S] of the step just done, averaged over all ranks and micro-batches."""
        if not self.active:
            return
        assert self.router is not None
        self._error = self._errors(density.detach().float(), progress)
        # Not before the target stands still: while it is 1, noise keeps the density below it and I would wind up.
        if self.router.budget.controller == "adaptive" and progress >= self.router.budget.reach_by:
            self._integral = self._integral + self.router.budget.adaptive_rate * self._error

    def state_dict(self) -> dict[str, Tensor]:
        """What an exact resume needs."""
        return {"error": self._error.cpu(), "integral": self._integral.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` returned."""
        for name in ("error", "integral"):
            if state[name].shape != (self.sites,):
                raise ValueError(
                    f"the checkpoint's budget has {state[name].numel()} routed sites, this model has {self.sites}; "
                    "resume with the router block the run was started with"
                )
        self._error = state["error"].to(self._error.device)
        self._integral = state["integral"].to(self._integral.device)

    def _errors(self, density: Tensor, progress: float) -> Tensor:
        assert self.router is not None
        if self.router.budget.kind == "global":
            density = (self._shares * density).sum().expand(self.sites)
        return density - self.target(progress)

    def _scale(self) -> Tensor:
        assert self.router is not None
        if self.router.budget.kind == "global":
            return self._shares * self.sites
        return torch.ones_like(self._shares)
