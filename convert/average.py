"""Average the weights of checkpoints: ``python -m convert.average RUN --last N OUT``.

    python -m convert.average runs/mine --last 5 runs/mine-mean
    python -m convert.average runs/mine --last 5 --decay 0.9 runs/mine-mean
    python -m convert.average runs/mine/checkpoints/step-00000800 runs/fork/checkpoints/step-00000900 runs/mean

The mean of each parameter over checkpoints of one model, uniform, or with weights that decay exponentially with the
distance in steps from the last one. OUT becomes a folder of weights that evaluation, ``convert.to_hf`` and stage two
read; config and tokenizer are those of the last checkpoint, by steps. ``train.checkpoint.keep`` and
``keep_every_steps`` decide which checkpoints a run keeps.

Parameters are summed one at a time in fp64, from fp32 master weights wherever there are any, and rounded to fp32 once.
The checkpoints' files are memory-mapped, and finished parameters are in an unnamed file on OUT's disk, so only one
parameter is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.files import nearest_folder, require_new_folder
from settings import command_parser, counted, path_argument, user_errors
from trainer.preflight import open_model

if TYPE_CHECKING:
    from torch import Tensor

    from tune.load import Loaded

Weights = Callable[[str], "Tensor"]
"""A parameter by its name, whole, in any dtype."""


class Member(NamedTuple):
    """A checkpoint and its weight in the mean."""

    loaded: Loaded
    """Its decoder is without storage."""
    share: float
    """Share of the mean; the shares of all members add up to 1."""


def average(paths: Sequence[Path], out: Path, last: int | None = None, decay: float | None = None) -> list[str]:
    """Write the mean of checkpoints to the new folder ``out``; returns a report, one line per item.

    Args:
        paths: two or more of what :func:`tune.load.load_model` reads; or one run, with ``last``.
        out: new or empty.
        last: how many of a run's newest whole checkpoints.
        decay: a checkpoint's weight is that of the next one times this, where steps are evenly spaced; uniform unless
            given.

    Raises:
        ValueError: with one sentence on the problem.
    """
    require_new_folder(out)
    from convert.facts import facts_of
    from trainer.checkpoints.empty_decoder import allocate
    from trainer.checkpoints.weights_folder import write_weights

    members = _shared_out(_opened(paths, last), decay)
    newest = members[-1].loaded
    for member in members:
        _require_no_adapters(member.loaded)
        _require_open(member.loaded)
        _require_one_model(member.loaded, newest)
    decoder = newest.decoder
    allocate(decoder, nearest_folder(out))
    with ExitStack() as files:
        _fill(decoder, [(files.enter_context(_weights_of(m.loaded)), m) for m in members])
    decoder.thresholds = _mean_thresholds(members)
    source = f"mean of {counted(len(members), 'checkpoint')}, " + _weighting(decay)
    known = facts_of(newest)
    kept = {name: known[name] for name in ("tokens", "target_density", "precision", "commit") if known.get(name)}
    write_weights(decoder, out, newest.tokenizer_folder, kept | {"source": source, "averaged": _provenance(members)})
    shares = [f"          {m.loaded.source}: {m.share:.2%}" for m in members]
    return [f"averaged  {source}", *shares, f"wrote     {out}"]


def _mean_thresholds(members: Sequence[Member]) -> Tensor | None:
    """Mean thresholds of the routers' margins, which are linear in the routers' weights; None for 0."""
    import torch

    given = [m.loaded.decoder.thresholds for m in members]
    if all(thresholds is None for thresholds in given):
        return None
    zero = torch.zeros(len(members[0].loaded.decoder.config.sites))
    sum_of = torch.stack([m.share * (zero if t is None else t).double() for m, t in zip(members, given, strict=True)])
    return sum_of.sum(0).float()


def _weighting(decay: float | None) -> str:
    return "uniform" if decay is None else f"each {decay:g} of the next one"


def _provenance(members: Sequence[Member]) -> list[dict[str, Any]]:
    """The members as recorded in the manifest."""
    from data.files import sha256_of
    from trainer.checkpoints import manifest

    return [
        {
            "checkpoint": str(loaded.source),
            "step": loaded.step,
            "share": share,
            "manifest_sha256": sha256_of(loaded.source / manifest.NAME),
        }
        for loaded, share in members
    ]


def _opened(paths: Sequence[Path], last: int | None) -> list[Loaded]:
    """The checkpoints without their weights, sorted by step if all have one, else in the order given."""
    from tune.load import load_empty, load_empty_checkpoint

    if last is None and len(paths) < 2:
        raise ValueError(
            f"the mean of {paths[0]} alone is itself; give --last N with a run, or two or more checkpoints"
        )
    if last is not None and len(paths) > 1:
        raise ValueError(
            f"--last {last} takes one run, but {counted(len(paths), 'path')} were given; leave it out to average them"
        )
    found = (
        [load_empty(path) for path in paths]
        if last is None
        else [load_empty_checkpoint(p) for p in _newest(paths[0], last)]
    )
    sources = [loaded.source.resolve() for loaded in found]
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise ValueError(f"{twice[0]} would be averaged with itself; give each checkpoint once")
    return sorted(found, key=lambda loaded: loaded.step or 0) if all(loaded.step for loaded in found) else found


def _newest(run: Path, last: int) -> list[Path]:
    """The newest ``last`` whole checkpoints of ``run``; torn ones are reported on stderr and skipped."""
    from trainer.checkpoints import manifest
    from trainer.checkpoints.layout import checkpoints_of, is_run, what_is_there
    from trainer.distributed import ALONE

    if last < 2:
        raise ValueError(f"--last must be at least 2, got {last}; the mean of a checkpoint alone is itself")
    if not is_run(run):
        what = f"give the folder that train.run_dir names{what_is_there(run)}"
        raise ValueError(f"--last {last} takes a run, but {run} is not one; {what}")
    whole, torn = manifest.newest_whole_ones(checkpoints_of(run), ALONE, last)
    manifest.report_torn(torn, ALONE)
    if len(whole) < last:
        there = ", ".join(path.name for path in whole) or "none"
        raise ValueError(
            f"--last {last} asks for {last} whole checkpoints, but {run} has {len(whole)} ({there}); ask for fewer, or "
            "have a run keep more of them (train.checkpoint.keep, keep_every_steps)"
        )
    return whole


def _shared_out(found: Sequence[Loaded], decay: float | None) -> list[Member]:
    """Checkpoints with their weights in the mean."""
    if decay is None:
        return [Member(loaded, 1 / len(found)) for loaded in found]
    if not 0 < decay < 1:
        raise ValueError(f"--decay must be above 0 and below 1, got {decay:g}; leave it out to weight all equally")
    without = [loaded.source for loaded in found if loaded.step is None]
    if without:
        raise ValueError(
            f"--decay needs the number of optimiser steps, which {without[0]} does not record; leave it out"
        )
    steps = [loaded.step or 0 for loaded in found]
    last, interval = max(steps), (max(steps) - min(steps)) / (len(steps) - 1)
    if not interval:
        raise ValueError(
            f"--decay needs different numbers of optimiser steps, but all checkpoints have {last}; leave it out"
        )
    weights = [decay ** ((last - step) / interval) for step in steps]
    return [Member(loaded, weight / sum(weights)) for loaded, weight in zip(found, weights, strict=True)]


def _require_open(loaded: Loaded) -> None:
    """Raise ValueError for a checkpoint from before the vote is fully open, because the weights do not hold how far."""
    from tune.config import TuneConfig

    if not isinstance(loaded.config, TuneConfig) or loaded.config.ensemble is None:
        return
    opened = math.ceil(loaded.config.ensemble.open_by * loaded.config.train.steps)
    if (loaded.step or 0) < opened:
        raise ValueError(
            f"{loaded.source} is of step {loaded.step}, but its late layers vote freely only from step {opened} on "
            "(ensemble.open_by); average checkpoints from there on"
        )


def _require_no_adapters(loaded: Loaded) -> None:
    from tune.config import TuneConfig

    if isinstance(loaded.config, TuneConfig) and loaded.config.adapter.kind in ("lora", "dora"):
        raise ValueError(
            f"{loaded.source} has {loaded.config.adapter.kind} adapters, and the product of averaged factors is not "
            f"the average of their products; merge each checkpoint (python -m tune.merge {loaded.source} OUT) and "
            "average those folders"
        )


def _require_one_model(one: Loaded, newest: Loaded) -> None:
    """Raise ValueError unless their parameters mean the same: sizes, routers, ensemble, seed, base and tokenizer."""
    from data.tokenization import tokenizer_sha256
    from trainer.checkpoints.compatibility import differences
    from tune.config import TuneConfig

    both = (one, newest)
    bases = [m.config.base.sha256 if isinstance(m.config, TuneConfig) else None for m in both]
    facts: dict[str, list[Any]] = {
        **{f"ensemble.{field}": [_of_ensemble(m, field) for m in both] for field in ("layers", "temperature", "top")},
        "seed": [m.decoder.seed for m in both],
        "base": [None if sha is None else sha[:12] for sha in bases],
        "tokenizer": [tokenizer_sha256(str(m.tokenizer_folder))[:12] for m in both],
    }
    changed = differences(one.decoder.config.model_dump(mode="json"), newest.decoder.config)
    changed += [f"{name} {there} there, {here} here" for name, (there, here) in facts.items() if there != here]
    if changed:
        raise ValueError(
            f"{one.source} and {newest.source} are different models ({'; '.join(changed)}), whose weights cannot be "
            "averaged; give checkpoints of one run, or of forks of it"
        )


def _of_ensemble(one: Loaded, field: str) -> Any:
    """A field of the ensemble's config; None without an ensemble."""
    return None if one.decoder.ensemble is None else getattr(one.decoder.ensemble.config, field)


@contextmanager
def _weights_of(loaded: Loaded) -> Iterator[Weights]:
    """The parameters of a checkpoint or a folder of weights."""
    from trainer.checkpoints.read_weights import matched
    from trainer.checkpoints.weights_folder import weights_in
    from trainer.config import WeightsConfig

    if isinstance(loaded.config, WeightsConfig):
        with weights_in(loaded.source, loaded.decoder) as file:
            yield file.get_tensor
        return
    found = matched(loaded.decoder, loaded.source, loaded.config.deepspeed.zero_stage)

    def read(name: str) -> Tensor:
        return found[name].master(loaded.source).view(found[name].shape)

    yield read


def _fill(decoder: Any, members: Sequence[tuple[Weights, Member]]) -> None:
    """Put the mean of each parameter into ``decoder``."""
    import torch

    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            mean = torch.zeros(parameter.shape, dtype=torch.float64)
            for read, member in members:
                weight = read(name)
                mean.add_(weight.double(), alpha=member.share)
                if not torch.isfinite(weight).all():
                    raise ValueError(
                        f"{name} in {member.loaded.source} is not finite, and the mean would not be either; leave that "
                        "checkpoint out"
                    )
            parameter.copy_(mean)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, average, write, report."""
    parser = command_parser("convert.average", __doc__)
    parser.add_argument(
        "paths",
        nargs="+",
        type=path_argument,
        metavar="RUN_OR_CHECKPOINT",
        help="a run, with --last; or two or more checkpoints, runs (their newest) or folders of weights",
    )
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the folder to write; new or empty")
    parser.add_argument("--last", type=int, metavar="N", help="average the newest N whole checkpoints of RUN")
    parser.add_argument(
        "--decay",
        type=float,
        metavar="D",
        help="weight of a checkpoint relative to the next one, above 0 and below 1; by optimiser steps where these are "
        "not evenly spaced (default: equal weights)",
    )
    options = parser.parse_intermixed_args(arguments)
    with user_errors():
        for path in options.paths:
            open_model(path)
        print("\n".join(average(options.paths, options.out, options.last, options.decay)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
