"""Stages of a mixture (``data.stages``): how much each source gives, from which token on.

    as written          main: from_tokens 0        annealing: from_share 0.9
    in the run folder   main: from_tokens 0        annealing: from_tokens 5529600        shares of the run, resolved
    as a mixture        Stage("main", 0, ...)      Stage("annealing", 21600, ...)        sample numbers

A stage ends where the next one begins, the last one with the run, so there are no gaps. Borders are sample numbers in
the order of :mod:`data.order`: ``data.skip_ranges`` does not move them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from data.skip_ranges import Ranges, sample_ids
from settings import Strict, did_you_mean
from settings.words import epochs


class Stage(NamedTuple):
    """A stage as :mod:`data.order` uses it."""

    name: str
    """Empty for the one stage of data without ``data.stages``."""
    first: int
    """Number of its first sample."""
    weights: Sequence[float]
    """Of each of ``data.sources``; 0 for one that it does not draw from."""


class MixtureStage(Strict):
    """A part of the run with weights of its own, up to where the next stage begins."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Its name in the log and in TensorBoard, such as ``annealing``."""
    from_tokens: int | None = Field(None, ge=0)
    """Tokens of the run before it begins, rounded up to whole windows."""
    from_share: float | None = Field(None, ge=0, lt=1)
    """Instead: share of ``train.steps`` before it begins. Resolved into from_tokens when the run is started."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Weights of the sources that it draws from, by name, in place of the sources' own; the others are not used."""

    @model_validator(mode="after")
    def _one_beginning(self) -> MixtureStage:
        if (self.from_tokens is None) == (self.from_share is None):
            raise ValueError(f"stage '{self.name}' must give exactly one of from_tokens and from_share")
        return self

    @property
    def beginning(self) -> str:
        """Where it begins, in words."""
        if self.from_tokens is None:
            return f"at {self.from_share:g} of the run"
        return f"at token {self.from_tokens:,}"

    def first_sample(self, sequence_tokens: int) -> int:
        """Number of its first sample, in windows of ``sequence_tokens``.

        Raises:
            ValueError: if it begins at a share of a run.
        """
        if self.from_tokens is None:
            raise ValueError(
                f"data.stages: '{self.name}' begins {self.beginning}, but this command knows no run, and so no length; "
                "give from_tokens"
            )
        return -(-self.from_tokens // sequence_tokens)

    def in_tokens(self, run_samples: int, sequence_tokens: int) -> MixtureStage:
        """The same in tokens of a run of ``run_samples``."""
        if self.from_share is None:
            return self
        tokens = round(self.from_share * run_samples) * sequence_tokens
        return self.model_copy(update={"from_tokens": tokens, "from_share": None})


def require_one_after_the_other(stages: Sequence[MixtureStage], sequence_tokens: int) -> None:
    """Raise ValueError unless the first stage begins with the run, and each later one at least a window later.

    A share and a number of tokens cannot be compared before the run's length is known; this is called again then.
    """
    first = stages[0]
    if first.from_tokens or first.from_share:
        raise ValueError(
            f"data.stages: the first stage, '{first.name}', begins {first.beginning}, which leaves a gap before it; "
            "set its from_tokens to 0"
        )
    for one, other in pairwise(stages):
        if one.from_tokens is not None and other.from_tokens is not None:
            apart = other.first_sample(sequence_tokens) > one.first_sample(sequence_tokens)
        elif one.from_share is not None and other.from_share is not None:
            apart = other.from_share > one.from_share
        else:
            continue
        if not apart:
            raise ValueError(
                f"data.stages: '{one.name}' begins {one.beginning} and '{other.name}', the next one, "
                f"{other.beginning}, so they overlap; let each begin at least one window "
                f"({sequence_tokens} tokens, data.sequence_tokens) after the one before it"
            )


def require_known_sources(stages: Sequence[MixtureStage], sources: Sequence[str]) -> None:
    """Raise ValueError unless stages have unique names, draw only from ``sources``, and each is used by some stage."""
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"data.stages: the names {', '.join(twice)} are used more than once; every name must be unique"
        )
    for stage in stages:
        for name in stage.weights:
            if name not in sources:
                raise ValueError(
                    f"data.stages: '{stage.name}' has a weight for '{name}', which is not in data.sources; "
                    f"{did_you_mean(name, sources)}"
                )
    if unused := [name for name in sources if not any(name in stage.weights for stage in stages)]:
        raise ValueError(
            f"data.stages: no stage has a weight for {', '.join(unused)} of data.sources; give one, or leave "
            f"{'it' if len(unused) == 1 else 'them'} out"
        )


def stage_after(mixture: Sequence[Stage], consumed: int, skip_ranges: Ranges) -> int:
    """Number of the stage that the last of the first ``consumed`` samples of a run is in; 0 where there is none yet."""
    last = sample_ids(0, consumed, skip_ranges)[1] if consumed else 0
    return bisect_right([stage.first for stage in mixture], last) - 1


def describe_shares(stage: Stage, sources: Sequence[str]) -> str:
    """``web 80%, code 20%``."""
    total = sum(stage.weights)
    given = zip(sources, stage.weights, strict=True)
    return ", ".join(f"{name} {100 * weight / total:.3g}%" for name, weight in given if weight)


def describe_stages(
    mixture: Sequence[Stage], sources: Sequence[tuple[str, Sequence[int], int | None]], sequence_tokens: int
) -> list[str]:
    """One line per stage: where it begins, and what a run takes from each source in it.

    Args:
        mixture: the stages.
        sources: of each its name, the windows that the run takes from it by stage, and how many it has, if known.
        sequence_tokens: of a window.
    """
    lines = []
    for number, stage in enumerate(mixture):
        parts = []
        for (name, taken, windows), weight in zip(sources, stage.weights, strict=True):
            if weight:
                passes = "" if windows is None else f" ({epochs(taken[number] / windows)})"
                parts.append(f"{name} {taken[number] * sequence_tokens:,} tokens{passes}")
        reached = any(taken[number] for _, taken, _ in sources)
        where = f"{stage.name} from token {stage.first * sequence_tokens:,} on: " if stage.name else ""
        lines.append(where + (", ".join(parts) if reached else "not reached by this run"))
    return lines
