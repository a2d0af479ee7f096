"""Engines in one process: parameter groups, offloading, Muon, and what DeepSpeed must not do when it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor

from model.config import EnsembleConfig
from model.decoder import Decoder
from model.init import initialise
from tests.trainer.one_rank import engine_for, losses, take_steps, weights
from trainer.config import PretrainConfig
from trainer.config_blocks import OptimizerConfig
from trainer.distributed import World
from trainer.engine import _draw, build_engine, parameter_groups, set_learning_rate

Configure = Callable[..., PretrainConfig]
MUON = ("train.optimizer.kind=muon", "train.clip_norm=0", "train.optimizer.lr=0.002")


@pytest.fixture
def without_compiler() -> Iterator[None]:
    """Run Muon's compiled kernel as it is written: compiling takes a minute and changes no result that matters here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_every_parameter_is_in_the_one_group_that_fits_it(configure: Configure) -> None:
    model = Decoder(configure("model.qk_norm=true").model)
    settings = {"lr": 0.5, "weight_decay": 0.2, "router_lr_ratio": 0.1, "router_weight_decay": 0.7}
    groups = parameter_groups(model, OptimizerConfig.model_validate(settings))
    names = {id(p): name for name, p in model.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in groups]
    assert sum(len(m) for m in members) == len(names) == len(set.union(*members))
    matrices, norms, routers = members
    assert len(routers) == 3 and all(name.endswith("router.weight") for name in routers)
    assert {"norm.weight", "layers.0.self_attn.q_norm.weight"} <= norms
    assert {p.dim() for p in model.parameters() if names[id(p)] in norms} == {1}
    assert {p.dim() for p in model.parameters() if names[id(p)] in matrices} == {2}
    assert {"embed_tokens.weight", "lm_head.weight"} <= matrices
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.5, 0.2), (0.5, 0.0), (0.05, 0.7)]


def test_the_vote_moves_by_the_rate_whatever_it_reads(configure: Configure) -> None:
    """A logit that reads the whole width moves by the rate times what it reads: at the others' rate it closes."""
    model = Decoder(configure("model.router=null").model)
    model.add_ensemble(EnsembleConfig(layers=2))
    optimizer = OptimizerConfig.model_validate({"lr": 0.5, "router_lr_ratio": 3.0})
    *_, bias, weight = parameter_groups(model, optimizer)
    assert [p.shape for p in (*bias["params"], *weight["params"])] == [(2,), (2, 32)]
    assert (bias["lr"], weight["lr"]) == (1.5, 1.5 / 32)


def test_a_dense_or_random_model_has_no_router_group(configure: Configure) -> None:
    assert len(parameter_groups(Decoder(configure("model.router=null").model), OptimizerConfig())) == 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_learning_rates_move_every_group_in_step(configure: Configure, world: World, stage: int) -> None:
    config = configure(
        f"deepspeed.zero_stage={stage}", "train.optimizer.lr=0.01", "train.optimizer.router_lr_ratio=0.5"
    )
    with engine_for(config, world) as engine:
        for ratio in (1.0, 0.2, 0.4):  # a ratio of the peak, not of what was set before
            set_learning_rate(engine, ratio)
            rates = [group["lr"] for group in engine.optimizer.param_groups]
            assert rates == pytest.approx([0.01 * ratio, 0.01 * ratio, 0.005 * ratio])


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloading_changes_where_state_lives_and_nothing_else(
    configure: Configure, world: World, stage: int, offload: str, precision: str
) -> None:
    stay = configure(f"deepspeed.zero_stage={stage}", f"train.precision={precision}")
    move = configure(f"deepspeed.offload={offload}")
    expected = losses(stay, world, 4)
    assert expected[-1] < expected[0] - 0.05
    assert losses(move, world, 4) == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_trains_the_same_at_every_stage(
    configure: Configure, world: World, without_compiler: None, stage: int
) -> None:
    got = losses(configure(*MUON, f"deepspeed.zero_stage={stage}"), world, 3)
    assert got[2] < got[0] - 0.03
    assert got == pytest.approx(losses(configure("deepspeed.zero_stage=0"), world, 3), rel=2e-4)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_muons_own_rate_reaches_its_matrices(
    configure: Configure, world: World, without_compiler: None, stage: int
) -> None:
    """DeepSpeed lets a group's rate win over ``muon_lr``."""
    router = ("train.optimizer.router_lr_ratio=0.5", "train.optimizer.router_weight_decay=0.3")
    config = configure(*MUON, *router, "train.optimizer.muon_lr_ratio=4", f"deepspeed.zero_stage={stage}")
    with engine_for(config, world) as engine:
        set_learning_rate(engine, 0.5)
        got = {g["name"]: (g["lr"], g["weight_decay"]) for g in engine.optimizer.param_groups}
    assert got == {
        "group0-muon-params": pytest.approx((0.004, 0.1)),
        "group0-adam-params": pytest.approx((0.001, 0.1)),  # embedding and head
        "group1-adam-params": pytest.approx((0.001, 0.0)),  # norms
        "group2-muon-params": pytest.approx((0.002, 0.3)),  # routers
    }


def test_building_an_engine_in_bf16_at_stage_0_takes_no_step(configure: Configure, world: World) -> None:
    """DeepSpeed steps once on zero gradients, which decays weights and counts; both are put back."""
    config = configure(
        "deepspeed.zero_stage=0", "train.precision=bf16", "train.optimizer.lr=0.1", "train.optimizer.weight_decay=1.0"
    )
    with engine_for(config, world) as engine:
        built = weights(engine)
        assert not engine.optimizer.optimizer.state
        masters = [m for group in engine.optimizer.fp32_groups for m in group]
        lows = [p for group in engine.optimizer.fp16_groups for p in group]
        assert all(torch.equal(m, p.float()) for m, p in zip(masters, lows, strict=True))
        take_steps(engine, config, world, 1)
        assert {int(s["step"]) for s in engine.optimizer.optimizer.state.values()} == {1}
    with engine_for(configure("train.precision=fp32"), world) as engine:
        for name, weight in weights(engine).items():
            assert torch.equal(built[name], weight.bfloat16()), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this rule is about CPUs")
def test_fp16_needs_a_gpu(configure: Configure, world: World) -> None:
    with pytest.raises(ValueError, match=r"train\.precision fp16 needs a GPU; use bf16 or fp32"):
        build_engine(configure("train.precision=fp16"), world)


@pytest.mark.parametrize(
    "extra", ["{zero_optimization: {reduce_bucket_size: many}}", "{communication_data_type: fp12}"]
)
def test_a_value_that_deepspeed_refuses_is_a_mistake(
    configure: Callable[..., PretrainConfig], world: World, extra: str
) -> None:
    with pytest.raises(ValueError, match=r"^DeepSpeed refuses its settings \(.*\); correct deepspeed.extra"):
        build_engine(configure(f"deepspeed.extra={extra}"), world)


@pytest.mark.quick
def test_clipping_at_stage_0_is_what_zero_does(configure: Configure, world: World) -> None:
    """The trainer's own clipping, and none at all, against DeepSpeed's."""
    for clip in ("0.1", "0"):
        ends = []
        for stage in (0, 1):
            config = configure(f"deepspeed.zero_stage={stage}", f"train.clip_norm={clip}")
            with engine_for(config, world) as engine:
                results = take_steps(engine, config, world, 2)
                ends.append((weights(engine), [r.grad_norm for r in results]))
        (own, own_norms), (theirs, their_norms) = ends
        assert own_norms == pytest.approx(their_norms, rel=1e-5)
        assert own_norms[0] is not None and own_norms[0] > 0.3  # before clipping
        for name in own:
            torch.testing.assert_close(own[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_partitioned_parameters_are_gathered_one_at_a_time(
    configure: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ZeRO 3 has them: empty outside ``gathered``, whole inside; a rank writes its own and nothing else."""
    config = configure()
    shapes = {name: p.shape for name, p in Decoder(config.model).named_parameters()}
    expected = Decoder(config.model)
    initialise(expected, config.model, config.train.seed)
    for rank in (0, 1):
        model = Decoder(config.model)
        names, whole = {p: name for name, p in model.named_parameters()}, 0
        written: dict[str, tuple[int, Tensor]] = {}
        for parameter in model.parameters():
            parameter.data = torch.empty(0)

        @contextmanager
        def gather(parameter: Tensor, modifier_rank: int, names: Any = names, written: Any = written) -> Iterator[None]:
            nonlocal whole
            whole += 1
            assert whole == 1
            parameter.data = torch.full(shapes[names[parameter]], torch.nan)
            yield
            if not parameter.isnan().all():
                written[names[parameter]] = modifier_rank, parameter.data
            parameter.data = torch.empty(0)
            whole -= 1

        monkeypatch.setattr("trainer.engine.gathered", gather)
        monkeypatch.setattr("trainer.engine.is_partitioned", lambda _: True)
        monkeypatch.setattr("trainer.engine.whole_shape", lambda p, names=names: shapes[names[p]])
        _draw(model, config, World(rank, 2, rank, 2, torch.device("cpu")), list(shapes))
        assert list(written) == list(shapes)[rank::2] and all(p.numel() == 0 for p in model.parameters())
        for name, (owner, values) in written.items():
            assert owner == rank and torch.equal(values, expected.get_parameter(name)), name


def test_zero_3_gathers_a_layer_as_one(configure: Configure, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are not fetched one by one, also with exploration, for which they are called twice."""
    config, fetched = configure("deepspeed.zero_stage=3", "model.router.explore=0.5"), []
    real = PartitionedParameterCoordinator.fetch_sub_module

    def fetch(self: Any, module: torch.nn.Module, forward: bool) -> None:
        fetched.append((type(module).__name__, forward))
        real(self, module, forward)

    with engine_for(config, world) as engine:
        take_steps(engine, config, world, 1)
        monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", fetch)
        take_steps(engine, config, world, 1, first=1)
    layers, micro_batches = config.model.layers, config.accumulation(1)
    assert fetched.count(("Block", True)) == layers * micro_batches
    assert {name for name, _ in fetched} == {"Decoder", "Embedding", "Block", "RMSNorm", "LMHead"}
