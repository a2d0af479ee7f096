"""A suite: runs that differ in a few keys of one config and are compared at equal executed FLOPs.

``bench/suites/*.yaml`` are suites, docs/isoflop.md says how to write one. Every run sees the same data in the same
order, and its planned FLOPs follow from its config alone:

    (3 x forward FLOPs a token (model/flops.py: head, K/V of every token and routers included) + exploration) x tokens

with full windows and every routed site at its target density averaged over the steps, so that a dense warm-up is
counted. With ``data.confine_attention``, tokens see fewer keys than in full windows; both sides of a match are then
overestimated by about the same share of their attention products.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data.config import File
from model.flops import density_of, full_windows, training_flops
from settings import PathText, Strict, load
from settings.project import resolve_shipped
from trainer.config import PretrainConfig, load_run

Keys = dict[str, Any]
"""Dotted keys of a run's config and their values; later ones win."""
Seed = Annotated[int, Field(ge=0, lt=2**62)]
_STEPS, _DENSITY = "train.steps", "model.router.density"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_OF_THE_SUITE = {
    "train.steps": "it follows from the suite's tokens",
    "train.seed": "it is one of the suite's seeds",
    "train.run_dir": "it follows from --out",
    "train.checkpoint.resume": "every run resumes by itself",
}
_THE_SAME_FOR_ALL = {
    "train.evaluation.samples": "losses are compared on the same windows and only the suite's own set may change them"
}
_OWN_DATA = ("data.confine_attention", "data.restart_positions")
"""The only data keys that a single variant may change."""


class Variant(Strict):
    """What one contestant changes."""

    title: str | None = None
    """Its name in tables and pictures; the variant's key unless given."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the run's config, dotted or nested, and their values; other keys stay the backbone's."""
    equal_flops: Literal["none", "tokens", "density"] = "none"
    """What is adjusted to match the reference's planned FLOPs: nothing, the number of training tokens, or
    ``model.router.density`` at the suite's tokens."""
    seeds: list[Seed] | None = Field(None, min_length=1)
    """Its own seeds; the suite's unless given."""


class Downstream(Strict):
    """Tasks for ``evals.harness``, on the last checkpoint of every run."""

    tasks: list[str] = Field(min_length=1)
    """``blimp`` (the mean over its paradigms), ``blimp_NAME``, ``classify_NAME`` (one shot), ``perplexity``."""
    data: File
    """Folder that holds ``blimp/``, ``tuning/`` and ``books/``; ``{texts}`` as in ``data.sources``."""
    limit: int | None = Field(None, gt=0)
    """First documents of each task; all unless given."""

    @field_validator("tasks")
    @classmethod
    def _local(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in ("blimp", "perplexity") and not task.startswith(("blimp_", "classify_")):
                raise ValueError(f"a task must be blimp, blimp_NAME, classify_NAME or perplexity, got '{task}'")
        return tasks


class Suite(Strict):
    """Runs to compare."""

    backbone: PathText
    """Config of a stage-one run. Every run uses it, with ``set`` and then its variant's ``set`` applied."""
    tokens: int = Field(gt=0)
    """Training tokens of every run, rounded to whole optimiser steps."""
    seeds: list[Seed] = Field([0], min_length=1)
    """Seeds of the weights and the routing noise (``train.seed``); the data's order is the same for all."""
    reference: str
    """The variant that the others are measured against and whose planned FLOPs they are matched to."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the run's config for every variant, as in a variant."""
    variants: dict[str, Variant] = Field(min_length=1)
    """By name: letters, digits, _ and -."""
    downstream: Downstream | None = None
    """Tasks for every finished run; none unless given."""
    dial: bool = True
    """Measure the compute dial of variants with learned routers, on their first seed (``evals.dial``, on the CPU)."""

    @model_validator(mode="after")
    def _possible(self) -> Suite:
        problems = [*_forbidden(self.set, "set", _OF_THE_SUITE), *_twice(self.seeds, "")]
        for name, variant in self.variants.items():
            if not re.fullmatch(_NAME, name):
                problems.append(
                    f"variant '{name}': a name is part of a folder name, so it must begin with a letter or digit and "
                    "have letters, digits, _ and - only"
                )
            problems += _forbidden(variant.set, f"variant {name}: set", _OF_THE_SUITE | _THE_SAME_FOR_ALL, _OWN_DATA)
            problems += _twice(variant.seeds or [], f"variant {name}: ")
        if self.reference not in self.variants:
            problems.append(
                f"reference '{self.reference}' is not a variant; it must be one of {', '.join(self.variants)}"
            )
        elif self.variants[self.reference].equal_flops != "none":
            problems.append(f"variant {self.reference} is the reference, to which others are matched; leave out its "
                            "equal_flops")  # fmt: skip
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def seeds_of(self, variant: Variant) -> list[int]:
        """A variant's own seeds, or the suite's."""
        return self.seeds if variant.seeds is None else variant.seeds

    def first_seed(self, name: str) -> int:
        """First seed of a variant."""
        return self.seeds_of(self.variants[name])[0]

    def title(self, name: str) -> str:
        """What tables and pictures call a variant."""
        return self.variants[name].title or name


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        variant, seed: of the run.
        folder: its run folder.
        overrides: ``key.sub=value`` for ``pretrain.train`` on the suite's backbone.
        config: the resolved config.
        planned_flops: executed FLOPs of its whole training, forward and backward.
    """

    variant: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    config: PretrainConfig
    planned_flops: float

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.name


def load_suite(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """A suite from its file and the command line.

    Raises:
        ValueError: with one sentence for each mistake.
    """
    suite = load(path, overrides, Suite)
    return suite.model_copy(update={"backbone": resolve_shipped(suite.backbone)})


def plan(suite: Suite, out: Path) -> list[Run]:
    """Every run of ``suite`` below ``out``, its config resolved and its FLOPs matched.

    Seeds are the outer loop, so that an interrupted suite has complete tables for fewer seeds.

    Raises:
        ValueError: for an invalid config, naming the variant, or FLOPs that cannot be matched.
    """
    reference = planned_flops(_resolve(suite, suite.reference, _keys(suite, suite.reference)))
    chosen = {name: _matched(suite, name, reference) for name in suite.variants}
    seeds = dict.fromkeys([*suite.seeds, *(s for v in suite.variants.values() for s in suite.seeds_of(v))])
    runs = []
    for seed in seeds:
        for name, variant in suite.variants.items():
            if seed not in suite.seeds_of(variant):
                continue
            folder = out / "runs" / f"{name}-seed{seed}"
            own = {"train.seed": seed, "train.run_dir": str(folder), "train.checkpoint.resume": "auto"}
            keys = {**chosen[name], **own}
            config = _resolve(suite, name, keys)
            runs.append(Run(name, seed, folder, tuple(_overrides(keys)), config, planned_flops(config)))
    if not runs[0].config.data.validation:
        raise ValueError(f"{suite.backbone} has no data.validation, but a suite compares validation losses")
    if mirror := next((run.config.train.checkpoint.mirror for run in runs if run.config.train.checkpoint.mirror), None):
        raise ValueError(
            f"train.checkpoint.mirror {mirror} belongs to one run, but a suite has {len(runs)}; set it to null in the "
            "suite's set"
        )
    return runs


def planned_flops(config: PretrainConfig) -> float:
    """Executed FLOPs of the whole training, forward and backward, full windows assumed."""
    tokens = float(config.train.steps * step_tokens(config))
    routed = full_windows(config.model, tokens, config.data.sequence_tokens, mean_target(config))
    return training_flops(config.model, routed)


def mean_target(config: PretrainConfig) -> float:
    """The target density, as a mean over the steps of the run; 1 for a dense model."""
    from model.budget import Budget

    budget, steps = Budget(config.model, config.data.sequence_tokens), config.train.steps
    return sum(budget.target(config.train.progress(step)) for step in range(steps)) / steps


def step_tokens(config: PretrainConfig) -> int:
    """Training tokens of one optimiser step."""
    return config.train.global_batch_samples * config.data.sequence_tokens


def _matched(suite: Suite, name: str, reference: float) -> Keys:
    """The keys of a variant, with its tokens or density adjusted to ``reference`` planned FLOPs if it asks for that."""
    keys, kind = _keys(suite, name), suite.variants[name].equal_flops
    config = _resolve(suite, name, keys)
    if kind == "tokens":
        keys[_STEPS] = max(round(config.train.steps * reference / planned_flops(config)), 1)
    elif kind == "density":
        keys.pop(_DENSITY, None)  # it goes last, after a key that holds a whole router block
        keys[_DENSITY] = _matched_density(suite, name, keys, config, reference)
    return keys


def _matched_density(suite: Suite, name: str, keys: Keys, config: PretrainConfig, reference: float) -> float:
    """The target density at which the planned FLOPs are ``reference``; they are linear in it."""
    if config.model.router is None:
        raise ValueError(
            f"variant {name}: equal_flops density chooses the density of a router, but this model is dense; give it a "
            "model.router, or take equal_flops: tokens"
        )

    def flops(density: float) -> float:
        return planned_flops(_resolve(suite, name, {**keys, _DENSITY: density}))

    density = density_of(flops, reference)
    if not 0 < density <= 1:
        most, half = flops(1.0) / reference, flops(0.5) / reference
        raise ValueError(
            f"variant {name}: no router.density in (0, 1] makes its executed FLOPs those of {suite.reference}; it "
            f"plans {2 * half - most:.2f} of them at 0 and {most:.2f} at 1; give it other layers, or "
            "equal_flops: tokens"
        )
    return round(density, 6)


def _keys(suite: Suite, name: str) -> Keys:
    """A variant's keys and the steps that the suite's tokens take, before any matching."""
    keys: Keys = {}
    for key, value in (*_flat(suite.set), *_flat(suite.variants[name].set)):
        keys.pop(key, None)  # order matters where one key is the block that holds another
        keys[key] = value
    # Resolved with more steps than any warm-up has, only to read the batch size.
    batch_tokens = step_tokens(_resolve(suite, name, {**keys, _STEPS: 2**31}))
    return {**keys, _STEPS: max(round(suite.tokens / batch_tokens), 1)}


def _resolve(suite: Suite, name: str, keys: Keys) -> PretrainConfig:
    try:
        return load_run(suite.backbone, _overrides(keys))
    except ValueError as error:
        hint = " (train.steps follows from the suite's tokens)" if _STEPS in str(error) else ""
        raise ValueError(f"variant {name}: {error}{hint}") from None


def _overrides(keys: Keys) -> list[str]:
    return [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in keys.items()]


def _flat(keys: Keys, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in keys.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _forbidden(
    keys: Keys, where: str, reasons: dict[str, str], own_data: tuple[str, ...] | None = None
) -> Iterator[str]:
    """A sentence for every key that may not be set; of the data keys only ``own_data`` may, unless that is None."""
    for key, _ in _flat(keys):
        if key in reasons:
            yield f"{where} must not have {key}, because {reasons[key]}; leave it out"
        elif own_data is not None and key.partition(".")[0] == "data" and key not in own_data:
            yield (
                f"{where} must not have {key}, because every run sees the same data in the same order; set it for all "
                "variants, in the suite's own set"
            )


def _twice(seeds: list[int], where: str) -> list[str]:
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    return [f"{where}seed {seed} is listed twice, but two runs cannot share a folder; list it once" for seed in twice]
