"""A capacity leaves the host nothing to wait for: a training step runs on tensors that have no values.

What reads a value (``item``, ``tolist``, a copy to the host) or makes a shape of values (``nonzero``) fails on a fake
tensor. So a step that runs here as far as the optimiser's update does not wait for a GPU there. FlexAttention's kernel
is replaced by plain PyTorch: what is asked for is which keys it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask

from data.batches import Batch
from model import flex
from model.budget import Budget, MarginStatistics
from model.decoder import Decoder
from trainer import step
from trainer.config import PretrainConfig
from trainer.distributed import ALONE


class Reached(Exception):
    """The step has come to the optimiser's update."""


class PlainEngine:
    """What a training step asks of an engine, without DeepSpeed."""

    def __init__(self, decoder: Decoder):
        self.module = decoder

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        """Between two micro-batches nothing is updated."""


def plain_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, **options: object) -> Tensor:
    """``flex_attention`` on [1, H, N, K] without its kernel."""
    places = (torch.arange(n) for n in (1, 1, q.shape[2], k.shape[2]))
    batch, head, query, key = torch.meshgrid(*places, indexing="ij")
    seen = block_mask.mask_mod(batch[0, 0], head[0, 0], query[0, 0], key[0, 0])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention as on a GPU, and a step that ends where the optimiser's update begins."""

    def update(engine: object, config: object) -> None:
        raise Reached

    monkeypatch.setattr("model.attention.attend", flex.flex_attend)
    monkeypatch.setattr(flex, "_kernel", lambda: plain_attention)
    monkeypatch.setattr(step, "_update", update)
    monkeypatch.setattr(step, "_count_targets", lambda batches: 256)  # of tensors of the host, before they are sent
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def train(config: PretrainConfig) -> None:
    """One step of two micro-batches on 64 tokens each, up to the update."""
    tokens = config.data.sequence_tokens
    samples = config.train.micro_batch_samples
    grid = torch.zeros(samples, tokens, dtype=torch.int64)
    first = torch.zeros(samples, dtype=torch.int64)
    documents = grid if config.data.confine_attention else None
    batch = Batch(grid, grid, first, documents, grid if config.data.restart_positions else None)
    budget = Budget(config.model, tokens)
    if budget.follows_margins:
        sites, wide = budget.sites, torch.float64
        seen = MarginStatistics(torch.zeros(2, sites, dtype=wide), torch.zeros(sites, config.model.width, dtype=wide))
        budget.observe(torch.ones(sites), config.train.progress(2), seen)
    decoder = Decoder(config.model, recompute=config.train.activation_checkpointing)
    step.train_step(PlainEngine(decoder), [batch, batch], budget, config, ALONE, 3)


@pytest.mark.parametrize(
    "options",
    [
        ["model.router.explore=0.1"],
        ["model.router.explore=0.1", "model.router.granularity=module", "train.activation_checkpointing=true"],
        ["model.router.explore=0.1", "model.router.budget.controller=quantile", "data.confine_attention=true"],
        ["model.router.explore=0.1", "data.restart_positions=true", "train.z_loss=0.001"],
        ["model.router.explore=0"],
        ["model.router=null"],
    ],
    ids=lambda options: " ".join(options).replace("model.router.", ""),
)
def test_a_step_with_a_capacity_reads_no_value(
    options: list[str], configure: Callable[..., PretrainConfig], as_on_cuda: None
) -> None:
    capacity = [] if "model.router=null" in options else ["model.router.execution=capacity"]
    with pytest.raises(Reached):
        train(configure(*options, *capacity))


def test_it_would_be_seen(configure: Callable[..., PretrainConfig], as_on_cuda: None) -> None:
    """The executions whose shapes follow the decisions do read them, and fail here."""
    for options in (["model.router.explore=0"], ["model.router.execution=reference", "model.router.explore=0.1"]):
        with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
            train(configure(*options))
