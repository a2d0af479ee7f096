"""The model and its optimiser inside a DeepSpeed engine, the same for every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from model.block import Block
from model.decoder import Decoder
from model.init import initial_values as draw
from model.roles import Role, role_of
from trainer.adafactor import Adafactor
from trainer.config import StageConfig
from trainer.config_blocks import OptimizerConfig
from trainer.deepspeed_config import deepspeed_config
from trainer.deepspeed_internals import gathered, import_deepspeed, is_partitioned, undo_first_step, whole_shape
from trainer.distributed import World


def build_engine(
    config: StageConfig,
    world: World,
    decoder: Decoder | None = None,
    drawn: Callable[[str], bool] = lambda name: True,
) -> Any:
    """Build a ``DeepSpeedEngine`` around a decoder; it trains the parameters that require a gradient.

    Args:
        config: the run's config.
        world: this process among all ranks.
        decoder: whole on every rank; a freshly initialised one unless given. Under ZeRO 3 a fresh one is built
            partitioned, so that no rank ever holds all of it; its weights are the same at every stage and world size
            (see ``model/init.py``).
        drawn: whether the fresh weight of this name must be initialised; one that is about to be read from a file is
            left undefined until then.

    Raises:
        ValueError: for a config that DeepSpeed cannot run here.
    """
    deepspeed = import_deepspeed()
    if config.train.precision == "fp16" and world.device.type == "cpu":
        raise ValueError("train.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    json = deepspeed_config(config, world.size)
    model = _new_decoder(config, json, world, drawn) if decoder is None else decoder
    if config.deepspeed.zero_stage == 3 and all(parameter.requires_grad for parameter in model.parameters()):
        # Gather and release each layer as one unit: a seventh of the collectives, and two thirds of the host time. Not
        # for partly frozen layers: their backward pass fails in DeepSpeed 0.19.8, on a weight that is not gathered.
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    model.recompute = config.train.activation_checkpointing
    model.lockstep = config.deepspeed.zero_stage == 3
    if config.train.compile:
        model.compile_layers()
    groups = parameter_groups(model, config.train.optimizer)
    optimizer = _optimizer(config, groups)
    before = [p.detach().clone() for p in model.parameters()] if _steps_when_built(config) else []
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=groups if optimizer is None else None,
            config=json,
            dist_init_required=False,
        )
    except ValueError as error:
        if not config.deepspeed.extra:
            raise
        raise ValueError(
            f"DeepSpeed refuses its settings ({' '.join(str(error).split())}); correct deepspeed.extra, or leave out "
            "what it adds"
        ) from error
    if before:
        undo_first_step(engine, before)
    for group in engine.optimizer.param_groups:
        ratio = config.train.optimizer.muon_lr_ratio if group.get("use_muon") else 1.0
        group["peak_lr"] = group["lr"] * ratio
    return engine


def _new_decoder(config: StageConfig, json: dict[str, Any], world: World, drawn: Callable[[str], bool]) -> Decoder:
    deepspeed = import_deepspeed()
    partitioned = config.deepspeed.zero_stage == 3
    with _nothing_drawn(), deepspeed.zero.Init(config_dict_or_path=json) if partitioned else nullcontext():
        model = Decoder(config.model, seed=config.train.seed)
    _draw(model, config, world, [name for name, _ in model.named_parameters() if drawn(name)])
    return model


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Context in which torch's modules leave their weights uninitialised: they are about to be drawn, or read."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Embedding)
    own = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = lambda self: None
        yield
    finally:
        for kind, reset in zip(kinds, own, strict=True):
            kind.reset_parameters = reset


def _draw(model: Decoder, config: StageConfig, world: World, names: Sequence[str]) -> None:
    """Draw each of these weights on one rank of the job only; collective.

    The ranks draw one weight each in parallel and then broadcast them, so a rank holds one weight besides its own
    parts.
    """
    for first in range(0, len(names), world.size):
        together = names[first : first + world.size]
        mine = together[world.rank] if world.rank < len(together) else None
        values = None
        if mine is not None:
            values = draw(mine, whole_shape(model.get_parameter(mine)), config.model, config.train.seed)
        for owner, name in enumerate(together):
            parameter = model.get_parameter(name)
            with gathered(parameter, modifier_rank=owner), torch.no_grad():
                if owner == world.rank:
                    assert values is not None
                    parameter.copy_(values)
            if not is_partitioned(parameter):
                world.broadcast(parameter.data, owner)


def set_learning_rate(engine: Any, ratio: float) -> None:
    """Set every parameter group's rate to ``ratio`` times its peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * ratio


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices, norms and routers, each with its rate and weight decay; empty groups are left out.

    DoRA's magnitudes are in the norms' group. The ensemble's router maps the whole width to one logit per layer, and
    one step of Adam moves a logit by the rate times the sum of its inputs; so its rate is divided by the width (as for
    outputs in Yang et al. 2022, arXiv:2203.03466). At the full rate the vote collapses in its first steps, while the
    late layers do not yet predict well, and a layer with weight zero gets no gradient to recover.
    """

    def of(*roles: Role) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if p.requires_grad and role_of(name) in roles]

    groups = [
        {"params": of("embedding", "head", "matrix"), "lr": optimizer.lr, "weight_decay": optimizer.weight_decay},
        {"params": of("norm", "magnitude"), "lr": optimizer.lr, "weight_decay": 0.0},
        {
            "params": of("router"),
            "lr": optimizer.lr * optimizer.router_lr_ratio,
            "weight_decay": optimizer.router_weight_decay,
        },
        *(
            {
                "params": [p],
                "lr": optimizer.lr * optimizer.router_lr_ratio / whole_shape(p)[1],
                "weight_decay": optimizer.router_weight_decay,
            }
            for p in of("vote")
        ),
    ]
    return [group for group in groups if group["params"]]


def optimizer_order(model: nn.Module) -> list[str]:
    """Names of the trained parameters, in the order of the optimiser's groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in parameter_groups(model, OptimizerConfig()) for parameter in group["params"]]


def _optimizer(config: StageConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
    """The optimiser to hand to DeepSpeed; None where DeepSpeed builds its own (Muon)."""
    optimizer = config.train.optimizer
    if optimizer.kind == "muon":
        return None
    if optimizer.kind == "adafactor":
        return Adafactor(groups, lr=optimizer.lr, beta2=optimizer.adafactor_beta2)
    # PyTorch's fused AdamW needs no compiler at run time, on CPU and on CUDA.
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)


def _steps_when_built(config: StageConfig) -> bool:
    """True where DeepSpeed takes one optimiser step on zero gradients at construction (stage 0 with bf16 or fp16)."""
    return config.deepspeed.zero_stage == 0 and config.train.precision != "fp32"
