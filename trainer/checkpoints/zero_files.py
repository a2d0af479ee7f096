"""Reads DeepSpeed's checkpoint files of any ZeRO stage by parameter: whole fp32 masters and optimiser state.

What the files hold depends on the ZeRO stage and the precision (DeepSpeed 0.19; W ranks, parameters in groups):

    stage 0, 1, 2   fp32         whole weights, which are the fp32 master weights
    stage 0         bf16         whole bf16 weights; fp32 masters, one tensor a parameter, without names
    stage 1, 2      bf16, fp16   whole weights; each group's masters concatenated and split into W partitions
    stage 3         any          no weights; each parameter's master split into W equal partitions, the last one padded

The optimiser's moments are laid out like the masters, at stages 1 and 2 in fp32 too. A frozen parameter has no master.
Its weight is whole at stages 0 to 2 and split like a master at stage 3, in the precision of the forward pass, which is
what the other parameters were trained with.

Masters are read wherever there are any. A bf16 weight is its master rounded, so at stages 0 to 2 every weight shows
whether its master was found in the right place. DeepSpeed's own converter does not support stage 0 and requires
unrestricted unpickling; the table of fragments beside the partitions is wrong under ``round_robin_gradients``. So only
the order of the parameters in ``param_shapes`` is used here.

Files are memory-mapped: a parameter's values are copied only when needed. A rank's files are opened when entries in
them are requested, so a rank that holds a part of everything opens few files and reads few of their entries, however
many ranks wrote them.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.deepspeed_internals import starts, types_in_files

MASTER = "master"
"""The name of the weights among the values of a parameter; the others are the optimiser's, such as ``exp_avg``."""
Pieces = Callable[[int, int], list[Tensor]]
"""Returns entries of a flat tensor, given the first index and the count, as views that concatenate to them; fewer where
the files have fewer."""


class StoredParameter(NamedTuple):
    """A parameter in the files.

    Attributes:
        name: as in the model.
        shape: of the whole parameter.
        values: accessors by name: always ``MASTER``, and for trained parameters the optimiser's state per entry.
        rounded: the weight in the precision of the forward pass, if the files hold it too.
        updates: the optimiser's own count of steps; None where it keeps none.
    """

    name: str
    shape: torch.Size
    values: dict[str, Pieces]
    rounded: Tensor | None = None
    updates: float | None = None

    def part(self, name: str, start: int = 0, size: int | None = None) -> Tensor:
        """``size`` entries of one of ``values`` (all unless given) from ``start`` on, copied from the file: fp32."""
        pieces = self.values[name](start, self.shape.numel() - start if size is None else size)
        return torch.cat([piece.float() for piece in pieces]) if pieces else torch.empty(0)

    def master(self, folder: Path, start: int = 0, size: int | None = None) -> Tensor:
        """:meth:`part` of the master, checked as :meth:`check` does."""
        found = self.part(MASTER, start, size)
        self.check(folder, found, start, size)
        return found

    def check(self, folder: Path, master: Tensor, start: int = 0, size: int | None = None) -> None:
        """Refuse a master that does not have the expected length, or does not round to its weight.

        Args:
            folder: where the files are, for the message.
            master: the entries that were read.
            start, size: what was asked for, as in :meth:`part`.

        Raises:
            ValueError: naming ``folder``.
        """
        right = master.numel() == (self.shape.numel() - start if size is None else size)
        if right and self.rounded is not None:
            weight = self.rounded.reshape(-1)[start : start + master.numel()]
            right = torch.equal(master.to(weight.dtype), weight)
        if not right:
            raise ValueError(
                f"{self.name} in {folder} is not where DeepSpeed 0.19 would have put it; read the checkpoint with the "
                "version of this project that wrote it"
            )


def stored(folder: Path, stage: int, ranks: int, trained: Sequence[str], state: bool) -> Iterator[StoredParameter]:
    """All parameters of a checkpoint, in an order that is the same on every rank.

    Args:
        folder: DeepSpeed's, in the checkpoint.
        stage, ranks: ZeRO stage and number of ranks that it was written with.
        trained: names of the parameters that the optimiser has, in its order; needed at stage 0, whose files do not
            hold them.
        state: whether to read the optimiser's state too, not only the masters.
    """
    if stage == 3:
        yield from _partitioned(folder, ranks, state)
        return
    states = _load(folder, "mp_rank_00_model_states.pt")
    weights: dict[str, Tensor] = states["module"]
    whole = all(weight.dtype == torch.float32 for weight in weights.values())
    if whole and not state:
        yield from whole_weights(weights)
    elif stage > 0:
        yield from _in_order(weights, states["param_shapes"], folder, state)
        yield from whole_weights(weights, {name for group in states["param_shapes"] for name in group})
    elif whole:
        kept = states["optimizer"]["state"]
        for place, name in enumerate(trained):
            yield _one_tensor(name, weights[name], weights[name], kept.get(place, {}))
        yield from whole_weights(weights, set(trained))
    else:
        masters = [master for group in states["optimizer"]["fp32_groups"] for master in group]
        low = {name: weights[name] for name in weights if name in set(trained)}
        kept = states["optimizer"]["optimizer_state_dict"]["state"] if state else {}
        yield from by_value(low, masters, kept)
        yield from whole_weights(weights, set(trained))


class Joined:
    """Flat tensors accessed as one, without a copy."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = parts

    def pieces(self, start: int, count: int) -> list[Tensor]:
        """``count`` entries from ``start`` on, as views; fewer where the parts end, or begin after ``start``."""
        found = []
        for part in self.parts:
            piece = part[max(start, 0) : max(start + count, 0)]
            if piece.numel():
                found.append(piece)
            start -= part.numel()
        return found


def by_value(weights: dict[str, Tensor], masters: list[Tensor], state: dict[int, Any]) -> Iterator[StoredParameter]:
    """Match unnamed masters: a weight's is the first of its shape that rounds to it (equal shapes keep their order)."""
    left = dict(enumerate(masters))
    for name, weight in weights.items():
        for place, master in left.items():
            if master.shape == weight.shape and torch.equal(master.to(weight.dtype), weight):
                yield _one_tensor(name, left.pop(place), weight, state.get(place, {}))
                break


def _like(state: dict[str, Any], like: torch.Size) -> dict[str, Tensor]:
    """Optimiser state with one value per entry of a parameter."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == like}


def _one_tensor(name: str, master: Tensor, weight: Tensor, state: dict[str, Any]) -> StoredParameter:
    values = {MASTER: master} | _like(state, master.shape)
    return StoredParameter(name, weight.shape, {n: pieces_of(v) for n, v in values.items()}, weight, _updates([state]))


def pieces_of(whole: Tensor) -> Pieces:
    """The accessor for a tensor in one piece."""
    return Joined([whole.reshape(-1)]).pieces


def whole_weights(weights: dict[str, Tensor], but: Collection[str] = ()) -> Iterator[StoredParameter]:
    """Whole weights, except those named in ``but``."""
    for name, weight in weights.items():
        if name not in but:
            yield StoredParameter(name, weight.shape, {MASTER: pieces_of(weight)})


def _in_order(
    weights: dict[str, Tensor], shapes: list[dict[str, torch.Size]], folder: Path, state: bool
) -> Iterator[StoredParameter]:
    """Stages 1 and 2: a group is its parameters concatenated (with gaps, if DeepSpeed aligned them) over all ranks.

    All partitions of a group are as long as the first. The last one is saved without the padding after the last
    parameter, as are its moments.
    """

    optimizer_of = cache(partial(_optimizer_state, folder))

    def kept(number: int, rank: int) -> dict[str, Any]:
        own = optimizer_of(rank)
        moments = own["base_optimizer_state"]["state"].get(number, {}) if state else {}
        return {MASTER: own["single_partition_of_fp32_groups"][number]} | moments

    def within(number: int, key: str, rank: int, begin: int, count: int) -> list[Tensor]:
        return Joined([kept(number, rank)[key]]).pieces(begin, count)

    for number, group in enumerate(shapes):
        first = kept(number, 0)
        lengths = {key: value.numel() for key, value in first.items() if isinstance(value, Tensor) and value.dim()}
        gaps = optimizer_of(0).get("param_alignment_paddings", [[0] * len(group)] * len(shapes))[number]
        for (name, shape), start in zip(group.items(), starts(group, gaps), strict=True):
            values: dict[str, Pieces] = {
                key: partial(_across, partial(within, number, key), n, start) for key, n in lengths.items()
            }
            yield StoredParameter(name, shape, values, weights[name], _updates([first]))


def _across(
    within: Callable[[int, int, int], list[Tensor]], length: int, offset: int, start: int, count: int
) -> list[Tensor]:
    """``count`` entries from ``offset + start`` on of what is split into equal lengths, one per rank.

    ``within`` returns entries of one rank's part, given the rank, the first index and the count.
    """
    found: list[Tensor] = []
    place, end = offset + start, offset + start + count
    while place < end:
        rank, begin = divmod(place, length)
        size = min(length - begin, end - place)
        found += within(rank, begin, size)
        place += size
    return found


def _partitioned(folder: Path, ranks: int, state: bool) -> Iterator[StoredParameter]:
    """Stage 3: trained parameters are in the optimiser files, frozen ones in the model files."""

    model_of, optimizer_of = cache(partial(_model_states, folder)), cache(partial(_optimizer_state, folder))

    def moments(rank: int) -> dict[int, Any]:
        return optimizer_of(rank)["optimizer_state_dict"]["state"] if state else {}

    @cache
    def trained(rank: int) -> dict[str, Joined]:
        return _partition(optimizer_of(rank)["fp32_flat_groups"], moments(rank))

    def frozen(rank: int) -> dict[str, Joined]:
        return {MASTER: Joined(list(model_of(rank)["frozen_param_fragments"].values()))}

    shapes, updates = model_of(0)["param_shapes"], _updates(list(moments(0).values()))
    yield from _whole_from_equal_parts(shapes, ranks, trained, updates)
    yield from _whole_from_equal_parts([model_of(0)["frozen_param_shapes"]], ranks, frozen)


def _whole_from_equal_parts(
    shapes: list[dict[str, torch.Size]],
    ranks: int,
    parts: Callable[[int], dict[str, Joined]],
    updates: float | None = None,
) -> Iterator[StoredParameter]:
    """Stage 3: every rank holds an equal part of every parameter, in the same order; the last parts are padded."""

    def within(key: str, start: int, rank: int, begin: int, count: int) -> list[Tensor]:
        return parts(rank)[key].pieces(start + begin, count)

    start = 0
    for name, shape in (entry for group in shapes for entry in group.items()):
        part = math.ceil(shape.numel() / ranks)
        values: dict[str, Pieces] = {key: partial(_across, partial(within, key, start), part, 0) for key in parts(0)}
        yield StoredParameter(name, shape, values, updates=updates)
        start += part


def _partition(masters: list[Tensor], state: dict[int, Any]) -> dict[str, Joined]:
    """Stage 3: one rank's flat tensors, one per sub-group, by name of the values."""
    states = [state.get(number, {}) for number in range(len(masters))]
    names = _like(states[0], masters[0].shape)
    return {MASTER: Joined(masters)} | {name: Joined([group[name] for group in states]) for name in names}


def _updates(states: Sequence[dict[str, Any]]) -> float | None:
    step = states[0].get("step") if states else None
    return None if step is None else float(step)


def _optimizer_state(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank's optimiser wrote; the file's name may begin with ``bf16_``."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return _load(folder, name if (folder / name).exists() else f"bf16_{name}")["optimizer_state_dict"]


def _model_states(folder: Path, rank: int) -> dict[str, Any]:
    """What else a rank wrote at stage 3."""
    return _load(folder, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


@contextmanager
def only_tensors(checkpoint: Path) -> Iterator[None]:
    """Let ``torch.load`` build tensors, plain containers and three DeepSpeed types, and nothing else.

    DeepSpeed itself asks for unrestricted unpickling, which would run whatever code a checkpoint holds.

    Raises:
        ValueError: for anything else in ``checkpoint``.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(types_in_files()):
            yield
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{checkpoint} holds more than tensors and numbers ({what[1] if what else 'an unknown object'}), which "
            "could run code when read; it was not written by this project or was changed since, so do not use it"
        ) from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load(folder: Path, name: str) -> Any:
    with only_tensors(folder.parent):
        return torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
