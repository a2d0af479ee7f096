"""A rank that resumes at another size opens the files and reads the entries that it keeps, however many ranks wrote."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.checkpoints.reshard import reshard
from trainer.checkpoints.zero_files import Joined
from trainer.distributed import World

GROUPS = [{"embed.weight": (400, 96), "mlp.weight": (96, 257)}, {"norm.weight": (96,)}]
FROZEN = {"frozen.weight": (130, 100)}
KEYS = ("master", "exp_avg", "exp_avg_sq")
SIZES = [(64, 48), (512, 384)]


class Alone(World):
    """One rank of many, whose others have nothing to say."""

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value]


@dataclass
class Read:
    """What was opened, and how many bytes of masters, moments and frozen weights were read."""

    opened: list[str] = field(default_factory=list)
    size_bytes: int = 0


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    counted, load, pieces = Read(), torch.load, Joined.pieces

    def counting_load(path: Path, **options: Any) -> Any:
        counted.opened.append(Path(path).name)
        return load(path, **options)

    def counting_pieces(self: Joined, start: int, count: int) -> list[Tensor]:
        found = pieces(self, start, count)
        counted.size_bytes += sum(piece.numel() * piece.element_size() for piece in found)
        return found

    monkeypatch.setattr(torch, "load", counting_load)
    monkeypatch.setattr(Joined, "pieces", counting_pieces)
    return counted


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Tensor]]:
    """Every parameter's values, flat, by name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for group in [*GROUPS, FROZEN] for name, shape in group.items()}
    return {n: {k: torch.randn(math.prod(s), generator=generator) for k in KEYS} for n, s in shapes.items()}


def _save(content: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)


def _sizes() -> list[dict[str, torch.Size]]:
    return [{name: torch.Size(shape) for name, shape in group.items()} for group in GROUPS]


def _flat(whole: dict[str, dict[str, Tensor]], group: dict[str, Any], key: str, ranks: int) -> list[Tensor]:
    """Stages 1 and 2: a group's values end to end, padded, one part a rank."""
    flat = torch.cat([whole[name][key] for name in group])
    length = -(-flat.numel() // (2 * ranks)) * 2
    return [part.clone() for part in nn.functional.pad(flat, (0, length * ranks - flat.numel())).split(length)]


def _part(value: Tensor, rank: int, ranks: int) -> Tensor:
    """Stage 3: a rank's part of a parameter, padded."""
    length = -(-value.numel() // ranks)
    part = value[rank * length : (rank + 1) * length]
    return nn.functional.pad(part, (0, length - part.numel()))


def _write_flat(folder: Path, whole: dict[str, dict[str, Tensor]], ranks: int) -> None:
    """As ZeRO 2 in bf16 does."""
    weights = {n: whole[n]["master"].bfloat16().view(s) for group in _sizes() for n, s in group.items()}
    _save({"module": weights, "param_shapes": _sizes()}, folder / "mp_rank_00_model_states.pt")
    parts = [{key: _flat(whole, group, key, ranks) for key in KEYS} for group in GROUPS]
    for rank in range(ranks):
        masters = [group["master"][rank] for group in parts]
        if rank == ranks - 1:  # saved without the padding
            for number, group in enumerate(GROUPS):
                left = sum(math.prod(s) for s in group.values()) - rank * masters[number].numel()
                masters[number] = masters[number][: max(left, 0)].clone()
        state = {n: {"step": 7.0} | {k: group[k][rank] for k in KEYS[1:]} for n, group in enumerate(parts)}
        content = {"base_optimizer_state": {"state": state}, "single_partition_of_fp32_groups": masters}
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        _save({"optimizer_state_dict": content}, path)


def _write_partitioned(folder: Path, whole: dict[str, dict[str, Tensor]], ranks: int) -> None:
    """As ZeRO 3 does."""
    for rank in range(ranks):
        frozen = {"frozen.weight": _part(whole["frozen.weight"]["master"], rank, ranks).bfloat16()}
        states = {"frozen_param_shapes": {n: torch.Size(s) for n, s in FROZEN.items()}, "param_shapes": _sizes()}
        path = f"zero_pp_rank_{rank}_mp_rank_00_{{}}_states.pt"
        _save(states | {"frozen_param_fragments": frozen}, folder / path.format("model"))
        flat = [{k: torch.cat([_part(whole[n][k], rank, ranks) for n in group]) for k in KEYS} for group in GROUPS]
        state = {number: {"step": 7.0} | {k: group[k] for k in KEYS[1:]} for number, group in enumerate(flat)}
        masters = [group["master"] for group in flat]
        content = {"fp32_flat_groups": masters, "optimizer_state_dict": {"state": state}}
        _save({"optimizer_state_dict": content}, folder / f"bf16_{path.format('optim')}")


def _own(stage: int, values: dict[str, Any], group: dict[str, Any], key: str, rank: int, ranks: int) -> Tensor:
    """What a rank keeps of a group, padding included."""
    if stage == 2:
        return _flat(values, group, key, ranks)[rank]
    return torch.cat([_part(values[name][key], rank, ranks) for name in group])


def _engine(stage: int, ranks: int, rank: int) -> Any:
    """What :func:`reshard` touches of an engine that one of ``ranks`` ranks has."""
    module = nn.Module()
    for group in [*GROUPS, FROZEN] if stage == 3 else GROUPS:
        for name, shape in group.items():
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=name not in FROZEN)
            if stage == 3:
                part = _part(parameter.detach().view(-1), rank, ranks)
                parameter.data = torch.empty(0, dtype=torch.bfloat16)
                parameter.ds_id, parameter.ds_tensor = 0, part
                parameter.ds_shape, parameter.ds_numel = torch.Size(shape), math.prod(shape)
            inner = nn.Module()
            inner.weight = parameter
            module.add_module(name.removesuffix(".weight"), inner)
    if stage == 3:
        lengths = [sum(-(-math.prod(s) // ranks) for s in group.values()) for group in GROUPS]
        flats = {"fp32_partitioned_groups_flat": [torch.zeros(length) for length in lengths]}
    else:
        lengths = [-(-sum(math.prod(s) for s in group.values()) // (2 * ranks)) * 2 for group in GROUPS]
        flats = {"single_partition_of_fp32_groups": [torch.zeros(length) for length in lengths]}
        flats["round_robin_bit16_padding"] = [[0] * len(group) for group in GROUPS]
    optimizer = SimpleNamespace(**flats, state=defaultdict(dict), update_lp_params=lambda: None)
    return SimpleNamespace(
        module=module, optimizer=optimizer, zero_optimization_stage=lambda: stage, _get_zero_param_shapes=_sizes
    )


def _kept(engine: Any, key: str) -> list[Tensor]:
    flats = (
        vars(engine.optimizer).get("fp32_partitioned_groups_flat") or engine.optimizer.single_partition_of_fp32_groups
    )
    return [flat if key == "master" else engine.optimizer.state[flat].get(key, flat * 0) for flat in flats]


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_opens_a_few_files_and_reads_its_own_bytes(
    tmp_path: Path, whole: dict[str, dict[str, Tensor]], read: Read, stage: int, old: int, new: int
) -> None:
    """512 ranks to 384: all that they keep, exactly, of a few files instead of 1,024, whatever the number of ranks."""
    (_write_partitioned if stage == 3 else _write_flat)(tmp_path / "deepspeed", whole, old)
    written = {"zero_stage": stage, "world_size": old}
    for rank in (0, 1, new // 3, new // 2, new - 2, new - 1):
        engine, world = _engine(stage, new, rank), Alone(rank, new, 0, 1, torch.device("cpu"))
        read.opened.clear()
        read.size_bytes = 0
        reshard(engine, tmp_path / "deepspeed", written, world)
        own = 0
        for number, group in enumerate(GROUPS):
            for key in KEYS:
                ones = {name: {key: torch.ones_like(whole[name][key])} for name in group}
                expected, real = (_own(stage, values, group, key, rank, new) for values in (whole, ones))
                assert torch.equal(_kept(engine, key)[number], expected)
                own += 4 * int(real.sum())
        if stage == 3:
            for name, parameter in engine.module.named_parameters():
                assert torch.equal(parameter.ds_tensor, _part(whole[name]["master"].bfloat16(), rank, new))
            own += 2 * int(_part(torch.ones(130 * 100), rank, new).sum())
        assert read.size_bytes == own
        # The first rank's, for names and shapes; then a slice of 4/3 parts lies in at most 3, of each kind of file; and
        # the norm's parts, of whole entries, lie a few ranks away.
        assert len(set(read.opened)) == len(read.opened) <= {2: 2 + 3 + 2, 3: 2 + 3 + 3 + 2}[stage]


def test_a_slice_that_does_not_round_to_its_weight_is_refused_on_every_rank(
    tmp_path: Path, whole: dict[str, dict[str, Tensor]]
) -> None:
    """The rank that has read it says so, and tells the others."""
    folder = tmp_path / "deepspeed"
    _write_flat(folder, whole, 4)
    path = folder / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=True)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].mul_(1.1)
    torch.save(content, path)
    written, told = {"zero_stage": 2, "world_size": 4}, []

    class Two(World):
        def all_gather_objects(self, value: Any) -> list[Any]:
            told.append(value)
            return told if self.rank == 0 else [None, value]

    for rank in (1, 0):  # rank 0 comes last, and knows what rank 1 has said
        with pytest.raises(ValueError, match=r"mlp\.weight in .* is not where DeepSpeed 0.19 would have put it"):
            reshard(_engine(2, 2, rank), folder, written, Two(rank, 2, 0, 1, torch.device("cpu")))
    assert told[1] is None
