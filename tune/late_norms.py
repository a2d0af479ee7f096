"""Initialises an ensemble's norms to get as near to the final layer's normed state as a norm can.

With ``x_i / rms(x_i)`` the state of late layer i and n_k the final one's normed state, the weights of norm i are the
least-squares fit, dimension by dimension, over the tokens with a target in the run's first windows:

    w_i = sum over tokens of (x_i / rms(x_i)) n_k  /  sum over tokens of (x_i / rms(x_i))^2

The final norm of a pretrained model does not fit the states of its earlier layers: with copies of it the vote starts
worse than the base model (docs/method.md has the figures).

Dimension letters: B batch, T tokens, D width, k late layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Batch
from model.chunks import IGNORE_INDEX
from model.decoder import Decoder
from trainer.distributed import World
from trainer.loop import TrainingStream

TOKENS = 4096
"""Least number read by all ranks together, including prompts and padding; windows are whole."""
_PASS_TOKENS = 1024
"""Most tokens in one forward pass, unless one window has more."""


def fit_norms(decoder: Decoder, data: TrainingStream, window_tokens: int, world: World) -> None:
    """Set the weights of ``decoder.ensemble.norms``, the same on every rank; collective.

    Args:
        decoder: whole, on the CPU, where it is left as well. One layer at a time is on the rank's device.
        data: its first windows are read.
        window_tokens: T.
    """
    ensemble = decoder.ensemble
    assert ensemble is not None
    sums = torch.zeros(2, len(ensemble.norms), decoder.config.width, dtype=torch.float64, device=world.device)
    training = decoder.training
    with torch.no_grad(), _a_layer_at_a_time(decoder.eval(), world.device):
        for batch in _first(data, window_tokens, world):
            *late, last = _late_states(decoder, batch, world.device)
            final = decoder.norm(last).double()
            for i, x in enumerate(late):
                unit = F.rms_norm(x, x.shape[-1:], None, decoder.norm.epsilon).double()
                sums[0, i] += (unit * final).sum(0)
                sums[1, i] += unit.square().sum(0)
    decoder.train(training)
    for norm, product, square in zip(ensemble.norms, *world.all_reduce_sum(sums), strict=True):
        with torch.no_grad():
            norm.weight.copy_(torch.where(square > 0, product / square, norm.weight.to(square)))


def _late_states(decoder: Decoder, batch: Batch, device: torch.device) -> list[Tensor]:
    """Residual streams of the late layers on the N tokens that have a target, [N, D] each."""
    more = {name: getattr(batch, name) for name in ("sample_ids", "documents", "positions")}
    more = {name: None if x is None else x.to(device) for name, x in more.items()}
    states, _ = decoder.late_states(batch.tokens.to(device), **more)
    voted = (batch.targets != IGNORE_INDEX).to(device)
    return [state[voted] for state in states]


def _first(data: TrainingStream, window_tokens: int, world: World) -> Iterator[Batch]:
    """This rank's share of the run's first windows, a few at a time."""
    own = range(world.rank, -(-TOKENS // window_tokens), world.size)
    together = max(_PASS_TOKENS // window_tokens, 1)
    for first in range(0, len(own), together):
        yield data.batch(own[first : first + together])


@contextmanager
def _a_layer_at_a_time(decoder: Decoder, device: torch.device) -> Iterator[None]:
    """Inside, ``device`` holds each large part of the decoder only while it runs, and the final norm all the time."""
    home = decoder.norm.weight.device
    large: list[nn.Module] = [decoder.embed_tokens, *decoder.layers]
    hooks = [part.register_forward_pre_hook(lambda part, _: _move(part, device)) for part in large]
    hooks += [part.register_forward_hook(lambda part, *_: _move(part, home)) for part in large]
    try:
        _move(decoder.norm, device)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in [decoder.norm, *large]:
            _move(part, home)


def _move(part: nn.Module, device: torch.device) -> None:
    part.to(device)
