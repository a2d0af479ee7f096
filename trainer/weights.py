"""A trained decoder out of a checkpoint, in one process: no ranks, no engine, and no code from pickles is run.

What DeepSpeed's files hold depends on the ZeRO stage and the precision (0.19; W ranks, groups of parameters):

    stage 0, 1, 2   fp32         whole weights, which are the fp32 master weights
    stage 0         bf16         whole bf16 weights; fp32 masters, one tensor a parameter, without names
    stage 1, 2      bf16, fp16   whole weights; each group's masters joined end to end and cut into W partitions
    stage 3         any          no weights; each parameter's master cut into W equal partitions, the last one padded

A parameter that does not train has no master. Its weight is whole at stages 0 to 2 and cut like a master at stage 3, in
the precision of the forward pass, which is what the others were trained with.

Masters are read wherever there are any. A bf16 weight is its master rounded, so at stages 0 to 2 every weight says
whether its master was found in the right place. DeepSpeed's own converter does not know stage 0 and asks for
unrestricted unpickling; the table of fragments beside the partitions is wrong under ``round_robin_gradients``. So the
order of the parameters in ``param_shapes`` is what counts here.

Files are mapped, not read: in memory is the fp32 model, and of the files what the system likes to keep; with ``disk``
the model is in a file, too (:mod:`trainer.allocate`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from model.decoder import Decoder
from settings import load
from trainer import checkpoint, manifest
from trainer.allocate import allocate, without_memory
from trainer.config import RunConfig
from trainer.distributed import ALONE, import_deepspeed


class _Stored(NamedTuple):
    """A parameter in the files.

    Attributes:
        name: as in the model.
        shape: of the whole parameter.
        pieces: flat tensors; one after the other they are its values.
        rounded: the weight in the precision of the forward pass, where the files hold it too.
    """

    name: str
    shape: torch.Size
    pieces: list[Tensor]
    rounded: Tensor | None = None


def load_decoder(run_or_checkpoint: Path, disk: Path | None = None) -> tuple[Decoder, RunConfig, int]:
    """The decoder in evaluation mode, fp32 on the CPU; the config of its run; and the optimiser steps it has had.

    Args:
        run_or_checkpoint: a run folder, of which the newest whole checkpoint is taken (torn ones are told on stderr and
            passed over), or one checkpoint's folder.
        disk: keep the weights in a file without a name in this folder; in memory unless given.

    Raises:
        ValueError: if there is no whole checkpoint, or it is of a tuning run, or it holds another model than its config
            says, or anything but tensors and numbers.
    """
    folder = checkpoint_of(run_or_checkpoint)
    if is_tuned(folder):
        raise ValueError(
            f"{folder} is of a tuning run, and only stage one can be read here; give the run that it was tuned from, "
            "or read this one in Python with tune.weights.load_tuned"
        )
    config = load(folder / "config.yaml", [], RunConfig)
    decoder = without_memory(config.model, config.train.seed)
    allocate(decoder, disk)
    step = fill(decoder, folder, config.deepspeed.zero_stage)
    return decoder, config, step


def fill(module: nn.Module, folder: Path, zero_stage: int) -> int:
    """Copy a checkpoint's weights into a module, fp32 masters wherever there are any.

    Args:
        module: as in the engine that wrote the checkpoint: the same names and shapes, and the same ``requires_grad``;
            fp32 on the CPU.
        folder: the checkpoint's, as :func:`checkpoint_of` returns it.
        zero_stage: that it was written at.

    Returns:
        The optimiser steps that the weights have had.

    Raises:
        ValueError: if the files hold another model, or anything but tensors and numbers.
    """
    written = manifest.read(folder, ALONE)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    import_deepspeed()  # quietly: the allowed types are its own
    with checkpoint.only_tensors(folder), torch.no_grad():
        _fill(module, _stored(folder / "deepspeed", zero_stage, written["world_size"], trained), folder)
    return written["step"]


def is_tuned(folder: Path) -> bool:
    """True for a checkpoint of stage two, whose config says what it was tuned from."""
    return "base" in yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that ``path`` names, every file of it as its manifest says.

    Args:
        path: a run folder, of which the newest whole checkpoint is taken, or one checkpoint's folder.

    Raises:
        ValueError: if there is none, or it is torn.
    """
    what = "give a run folder (train.run_dir) or one of the step-N folders in its checkpoints/"
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; {what}")
    folder = path / "checkpoints"
    if not folder.is_dir():
        problem = manifest.problem_of(path, ALONE)
        if problem is not None:
            raise ValueError(f"{path} is neither a run folder nor a whole checkpoint: {problem}; {what}")
        return path
    found, torn = checkpoint.find(folder, ALONE)
    for sentence in torn:
        print(f"passed over: {sentence}", file=sys.stderr, flush=True)
    if found is None:
        raise ValueError(f"{folder} holds no whole checkpoint; train until one is saved, or give another run folder")
    return found


def _fill(module: nn.Module, stored: Iterable[_Stored], folder: Path) -> None:
    """Copy what the files hold into the module; every parameter once, in its shape."""
    wanted = dict(module.named_parameters())
    # Second names of the same weight, as a tied head's: some files have them, too.
    again = {name for name, _ in module.named_parameters(remove_duplicate=False)} - wanted.keys()
    problems = []
    for entry in stored:
        parameter = wanted.pop(entry.name, None)
        if parameter is None:
            if entry.name not in again:
                problems.append(f"{entry.name} is there, but not in the config's model")
        elif parameter.shape != entry.shape:
            problems.append(f"{entry.name} is {list(entry.shape)} there and {list(parameter.shape)} by the config")
        else:
            _copy(parameter, entry, folder)
    problems += [f"{name} is missing" for name in wanted]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights in {folder} do not match its config.yaml ({'; '.join(problems[:3])}{more}); one of them was "
            "changed since, so take another checkpoint"
        )


def _copy(parameter: Tensor, entry: _Stored, folder: Path) -> None:
    flat, done = parameter.view(-1), 0
    for piece in entry.pieces:
        flat[done : done + piece.numel()] = piece
        done += piece.numel()
    if done != flat.numel() or not (
        entry.rounded is None or torch.equal(parameter.to(entry.rounded.dtype), entry.rounded)
    ):
        raise ValueError(
            f"{entry.name} in {folder} is not where DeepSpeed 0.19 would have put it; read the checkpoint with the "
            "version of this project that wrote it"
        )


def _stored(folder: Path, stage: int, ranks: int, trained: set[str]) -> Iterator[_Stored]:
    """All parameters in DeepSpeed's ``folder``; of the ``trained`` ones the masters, where there are any."""
    if stage == 3:
        models = [_load(folder, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt") for rank in range(ranks)]
        flat = [_Joined(state["fp32_flat_groups"]) for state in _optimizer_states(folder, ranks)]
        yield from _whole_from_equal_parts(models[0]["param_shapes"], flat)
        frozen = [_Joined(list(model["frozen_param_fragments"].values())) for model in models]
        yield from _whole_from_equal_parts([models[0]["frozen_param_shapes"]], frozen)
        return
    states = _load(folder, "mp_rank_00_model_states.pt")
    weights: dict[str, Tensor] = states["module"]
    if all(weight.dtype == torch.float32 for weight in weights.values()):
        yield from _as_they_are(weights, set())
    elif stage == 0:  # the only files that do not say which parameters have trained
        masters = [master for group in states["optimizer"]["fp32_groups"] for master in group]
        yield from _by_value({name: weight for name, weight in weights.items() if name in trained}, masters)
        yield from _as_they_are(weights, trained)
    else:
        yield from _in_order(weights, states["param_shapes"], _optimizer_states(folder, ranks))
        yield from _as_they_are(weights, {name for group in states["param_shapes"] for name in group})


def _as_they_are(weights: dict[str, Tensor], but: set[str]) -> Iterator[_Stored]:
    """Whole weights, all ``but`` those."""
    for name, weight in weights.items():
        if name not in but:
            yield _Stored(name, weight.shape, [weight.reshape(-1)])


def _by_value(weights: dict[str, Tensor], masters: list[Tensor]) -> Iterator[_Stored]:
    """Masters without names: a weight's is the first of its shape that rounds to it (equal shapes keep their order)."""
    for name, weight in weights.items():
        for place, master in enumerate(masters):
            if master.shape == weight.shape and torch.equal(master.to(weight.dtype), weight):
                yield _Stored(name, weight.shape, [masters.pop(place).reshape(-1)])
                break


def _in_order(
    weights: dict[str, Tensor], shapes: list[dict[str, torch.Size]], optimizers: list[dict[str, Any]]
) -> Iterator[_Stored]:
    """Stages 1 and 2: a group is its parameters end to end (with gaps, if DeepSpeed aligned them) over all ranks."""
    for number, group in enumerate(shapes):
        joined = _Joined([state["single_partition_of_fp32_groups"][number] for state in optimizers])
        gaps = optimizers[0].get("param_alignment_paddings", [[0] * len(group)] * len(shapes))[number]
        start = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            yield _Stored(name, shape, joined.pieces(start, shape.numel()), weights[name])
            start += shape.numel() + gap


def _whole_from_equal_parts(shapes: list[dict[str, torch.Size]], ranks: list[_Joined]) -> Iterator[_Stored]:
    """Stage 3: every rank holds an equal part of every parameter, in the same order; the last parts are padded."""
    start = 0
    for name, shape in (entry for group in shapes for entry in group.items()):
        part = math.ceil(shape.numel() / len(ranks))
        pieces: list[Tensor] = []
        for rank, joined in enumerate(ranks):
            pieces += joined.pieces(start, max(min(part, shape.numel() - rank * part), 0))
        yield _Stored(name, shape, pieces)
        start += part


class _Joined:
    """Flat tensors as if they were one, without a copy."""

    def __init__(self, parts: list[Tensor]):
        self.parts = parts

    def pieces(self, start: int, count: int) -> list[Tensor]:
        """``count`` entries from ``start`` on, as views; fewer where the parts end."""
        found = []
        for part in self.parts:
            piece = part[max(start, 0) : max(start + count, 0)]
            if piece.numel():
                found.append(piece)
            start -= part.numel()
        return found


def _optimizer_states(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank's optimiser wrote, in rank order; the names begin with ``bf16_`` or do not."""
    names = []
    for rank in range(ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        names.append(name if (folder / name).exists() else f"bf16_{name}")
    return [_load(folder, name)["optimizer_state_dict"] for name in names]


def _load(folder: Path, name: str) -> Any:
    return torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
