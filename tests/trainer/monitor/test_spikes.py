"""What is a spike and what is not: falls, ramps, mixtures, single batches, spikes that last."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config_blocks import SpikeConfig
from trainer.monitor.spikes import Spike, SpikeDetector

BATCH = 4


def watch(losses: Any, norms: Any = None, first: int = 0, detector: SpikeDetector | None = None, **config: Any) -> Any:
    """All spikes that are reported while a run sees these losses, by step."""
    detector = detector or SpikeDetector(SpikeConfig.model_validate(config))
    told: dict[int, Spike] = {}
    for number, loss in enumerate(losses, start=first):
        norm = None if norms is None else float(norms[number - first])
        spike = detector.observe(number + 1, BATCH * number, BATCH * (number + 1), float(loss), norm)
        if spike is not None:
            told[number + 1] = spike
    return told


def falling(steps: int, noise: float = 0.03, seed: int = 0) -> np.ndarray:
    """A loss as pretraining has it: a power law from 10 nats, with the batches' noise."""
    return 2 + 8 * np.arange(1, steps + 1) ** -0.3 + noise * np.random.default_rng(seed).standard_normal(steps)


def rough(steps: int, seed: int = 0) -> np.ndarray:
    """Gradient norms with a long tail: log-normal, falling from 5 to 0.5."""
    return np.exp(0.5 * np.random.default_rng(seed).standard_normal(steps)) * (0.5 + 4.5 / np.arange(1, steps + 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_goes_well_has_none(seed: int) -> None:
    assert watch(falling(5000, seed=seed), rough(5000, seed)) == {}


@pytest.mark.parametrize("window", [20, 200])
def test_the_fall_at_the_start_a_ramp_and_warm_up_are_none(window: int) -> None:
    steep = np.concatenate([falling(400, 0.001), np.linspace(2.5, 4.0, 500)])  # as when a density target comes down
    assert watch(steep, np.linspace(0.1, 9.0, 900), window_steps=window) == {}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_easy_and_hard_batches_are_none(share: float) -> None:
    """A median and its deviations would take the rarer kind for spikes."""
    generator = np.random.default_rng(3)
    hard = generator.random(4000) < share
    assert watch(np.where(hard, 4.0, 1.0) + 0.01 * generator.standard_normal(4000)) == {}


def test_a_spike_is_told_when_it_begins_and_when_it_ends() -> None:
    losses = falling(1000)
    losses[600:607] += 0.6
    told = watch(losses)
    assert sorted(told) == list(range(601, 609))
    assert [step for step, spike in told.items() if spike.is_news] == [601, 608]
    begun, over = told[601], told[608]
    assert (begun.first_step, begun.last_step, begun.steps, begun.consumed_before, begun.consumed) == (
        601, 601, 1, 2400, 2404,
    )  # fmt: skip
    window = losses[400:600]
    expected = (
        f"the loss rose to {losses[600]:.4f} from a mean of {window.mean():.4f} over 200 steps, above the limit of "
        f"{window.mean() + 7 * window.std():.4f} (7 standard deviations above the mean)"
    )
    assert str(begun) == f"spike at step 601: {expected}"
    assert (over.last_step, over.steps, over.consumed_before, over.consumed) == (607, 7, 2400, 2428)
    assert str(over) == f"spike at steps 601 to 607, which is over: {expected}"


def test_a_gradient_may_spike_alone() -> None:
    norms = rough(500)
    norms[300] = 1e6
    told = watch(falling(500), norms)
    assert sorted(told) == [301, 302] and str(told[301]).startswith(
        "spike at step 301: the gradient norm rose to 1e+06"
    )
    norms[300] = 0.0  # nothing to take a logarithm of
    assert watch(falling(500), norms) == {}


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    for place, told in ((100, []), (199, []), (200, [201, 202])):
        losses = 3 + 0.01 * np.random.default_rng(0).standard_normal(210)
        losses[place] += 5.0
        assert sorted(watch(losses)) == told


def test_what_lasts_as_long_as_the_window_is_normal_from_then_on() -> None:
    losses = falling(1000)
    losses[300:] += 1.5
    told = watch(losses, window_steps=100)
    assert sorted(told) == list(range(301, 401)) and told[400].end is not None and told[399].end is None
    assert "steps 301 to 400, which has lasted for train.spike.window_steps" in str(told[400])
    losses[800] += 1.0
    assert sorted(watch(losses, window_steps=100)) == [*range(301, 401), 801, 802]


@pytest.mark.parametrize("at", [100, 250, 304, 310])
def test_its_state_goes_on_exactly(at: int) -> None:
    """Before, in the middle of and after a spike; through a file, as a checkpoint has it."""
    losses, norms = falling(400), rough(400)
    losses[300:308] += 2.0
    straight = watch(losses, norms)
    assert len(straight) == 9
    first = SpikeDetector(SpikeConfig())
    told = watch(losses[:at], norms[:at], detector=first)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = SpikeDetector(SpikeConfig())
    second.observe(1, 0, 4, math.pi, 1.0)  # what it held before does not matter
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert told | watch(losses[at:], norms[at:], first=at, detector=second) == straight


def test_a_spike_that_is_longer_than_a_window_that_was_made_shorter_passes() -> None:
    losses = falling(600)
    losses[300:] += 4.0
    first = SpikeDetector(SpikeConfig(window_steps=200))
    watch(losses[:450], detector=first)
    second = SpikeDetector(SpikeConfig(window_steps=100))
    second.load_state_dict(first.state_dict())
    told = watch(losses[450:], first=450, detector=second)
    assert list(told) == [451] and "counts as normal from now on" in str(told[451].end)


@pytest.mark.parametrize(("window", "told"), [(50, [301, 302]), (400, [])])
def test_a_window_of_another_size_takes_the_newest_values(window: int, told: list[int]) -> None:
    losses = falling(320)
    losses[300] += 2.0
    first = SpikeDetector(SpikeConfig())
    watch(losses[:300], detector=first)
    second = SpikeDetector(SpikeConfig(window_steps=window))
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["losses"] == losses[300 - min(window, 200) : 300].tolist()
    assert sorted(watch(losses[300:], first=300, detector=second)) == told
