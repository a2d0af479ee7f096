"""Batches for training and evaluation. B: samples in a batch, T: tokens in a window (``data.sequence_tokens``).

A run's data position is one number, the samples consumed. Which samples a rank takes in a step follows from it
(:func:`step_sample_ids`), and which tokens a sample holds follows from its number (:mod:`data.order`)::

    s samples consumed, global batch G, 2 ranks, 2 micro-steps of m samples: G = 4 m
    sample   s .. s+m-1   | s+m .. s+2m-1   | s+2m .. s+3m-1   | s+3m .. s+4m-1
    taken by rank 0, 1st  | rank 1, 1st     | rank 0, 2nd      | rank 1, 2nd micro-step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig, SourceConfig, StreamConfig
from data.order import ORDER_VERSION, Order
from data.skip_ranges import pass_over
from data.store import TokenStore, require_configured, train_folder, validation_folder
from data.tokenization import tokenizer_sha256

IGNORE_INDEX = -100
"""Marks a target without a loss."""
NO_SAMPLE = -1
"""Sample id of a padding row."""


@dataclass(frozen=True)
class Batch:
    """B samples of T tokens, on the CPU."""

    tokens: Tensor
    """int64 [B, T], the inputs."""
    targets: Tensor
    """int64 [B, T], the token after each input; -100 where no loss is taken."""
    sample_ids: Tensor
    """int64 [B]; -1 for a padding row of a validation batch."""
    documents: Tensor | None
    """int64 [B, S], number of the document within the window, from 0, never decreasing; None unless confine_attention.
    Always of whole windows: S = T unless :meth:`at` took a part of them."""
    positions: Tensor | None
    """int64 [B, T], 0 at every document's and every window's start; None unless restart_positions."""
    scored_targets: int | None = None
    """How many targets are not -100, where those are few: the head then runs on their tokens only."""
    sources: Tensor | None = None
    """int64 [B], the number of each sample's source in ``data.sources``; None outside training."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``change`` applied to each of its tensors."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {n: change(part) if isinstance(part, Tensor) else part for n, part in parts.items()}
        return Batch(**changed)

    def at(self, places: Tensor) -> Batch:
        """The part of its windows at ``places``, int64 [T']; ``documents`` stays that of whole windows."""

        def part(of_tokens: Tensor) -> Tensor:
            taken = of_tokens.index_select(1, places)
            return taken.pin_memory() if of_tokens.is_pinned() else taken

        targets = part(self.targets)
        return replace(
            self,
            tokens=part(self.tokens),
            targets=targets,
            positions=None if self.positions is None else part(self.positions),
            scored_targets=None if self.scored_targets is None else int((targets != IGNORE_INDEX).sum()),
        )


@dataclass(frozen=True)
class SourceSummary:
    """Size of one source, and its share of the training."""

    name: str
    tokens: int
    windows: int
    """Samples in one epoch."""
    share: float
    """Of the run's samples."""
    taken: Sequence[int]
    """Samples that the run takes from it, by stage of the mixture."""

    @property
    def epochs(self) -> float:
        """How often the run goes through this source."""
        return sum(self.taken) / self.windows


class MixedStream:
    """What the training data of both stages share: windows of all sources, mixed and shuffled."""

    def __init__(self, config: StreamConfig, windows: Sequence[int]) -> None:
        """``windows`` of each source."""
        self._stream = config
        names = [source.name for source in config.sources]
        self._order = Order(names, windows, config.mixture(), config.seed)

    def _located(self, consumed: Sequence[int] | range) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Sample ids int64 [B], their sources' numbers int64 [B], and for each sample its source and window."""
        sample_ids = pass_over(np.asarray(consumed, np.int64), self._stream.skip_ranges)
        sources, _, windows = self._order.locate(sample_ids)
        return sample_ids, sources, list(zip(sources.tolist(), windows.tolist(), strict=True))

    def _shares(self, samples: int) -> tuple[np.ndarray, list[float]]:
        """Samples from each source by stage in a run of ``samples``, int64 [K, S], and each source's share of it."""
        taken = self._order.mixture.taken(samples, self._stream.skip_ranges)
        return taken, (taken.sum(axis=0) / samples).tolist()

    def _fingerprint(self, sources: Sequence[dict[str, Any]], **decisive: Any) -> str:
        """SHA-256 of the contents of the ``sources``, of the order, and of whatever else is ``decisive``."""
        first, *later = self._stream.mixture()
        if later:
            decisive["stages"] = [{"first": stage.first, "weights": stage.weights} for stage in later]
        decisive |= {
            "order_version": ORDER_VERSION,
            "seed": self._stream.seed,
            "sequence_tokens": self._stream.sequence_tokens,
            "sources": [
                {"name": source.name, "weight": weight, **held}
                for source, weight, held in zip(self._stream.sources, first.weights, sources, strict=True)
            ],
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class TrainingData(MixedStream):
    """All sources, mixed and shuffled."""

    def __init__(self, config: DataConfig, pin_memory: bool = False, check_files: bool = True) -> None:
        """Open every source; batches are in pinned memory if asked, ``check_files`` as for :class:`TokenStore`.

        Raises:
            ValueError: a source is missing, damaged, shorter than one window, made with other settings than the
                config's, with another tokenizer than the data folder's, or with other begin or end tokens of documents
                than the first source's (so two tokenizers never mix).
        """
        self._config = config
        self._pin_memory = pin_memory
        self._tokenizer_sha256 = tokenizer_sha256(config.dir)
        self._stores = [
            _open(source, train_folder(config, source.name), self._tokenizer_sha256, config, check_files)
            for source in config.sources
        ]
        _require_one_vocabulary(self._stores)
        super().__init__(config, [store.windows(config.sequence_tokens) for store in self._stores])

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return self._stores[0].manifest.vocab_size

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError unless ``vocab_size``, the config's, is the one that the shards were made with."""
        if self.vocab_size != vocab_size:
            raise ValueError(
                f"the shards in {self._config.dir} have a vocabulary of {self.vocab_size}, but "
                f"data.tokenizer.vocab_size is {vocab_size}; set model.vocab_size and data.tokenizer.vocab_size to "
                f"{self.vocab_size}, or prepare the data in another data.dir"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which tokens sample i holds; a run resumes exactly only if it is the same.

        ``skip_ranges`` is left out: it is meant to be changed during a run. ``confine_attention`` and
        ``restart_positions`` are left out too: they change what the model sees of the tokens, not the tokens.
        """
        sources = [
            {"files": [{name: file.sha256 for name, file in shard.files.items()} for shard in store.manifest.shards]}
            for store in self._stores
        ]
        return self._fingerprint(sources, tokenizer=self._tokenizer_sha256)

    def summary(self, samples: int) -> list[SourceSummary]:
        """One entry per source, for a run of ``samples``."""
        length = self._config.sequence_tokens
        taken, shares = self._shares(samples)
        return [
            SourceSummary(source.name, store.tokens, store.windows(length), share, by_stage)
            for source, store, share, by_stage in zip(
                self._config.sources, self._stores, shares, taken.T.tolist(), strict=True
            )
        ]

    def batch(self, consumed: Sequence[int] | range) -> Batch:
        """The samples at these places of the run: ``consumed`` is the number of samples consumed before each.

        With ``skip_ranges`` set, ``Batch.sample_ids`` runs ahead of ``consumed`` by the samples skipped.
        """
        sample_ids, sources, places = self._located(consumed)
        rows = [self._stores[source].window(window, self._config.sequence_tokens) for source, window in places]
        return _batch(rows, sample_ids, self._config, self._pin_memory, sources)


class ValidationSet:
    """One named validation set: its windows in order, the same every time."""

    def __init__(self, config: DataConfig, name: str, check_files: bool = True) -> None:
        """Open ``name``, one of ``config.validation``; ``check_files`` as for :class:`TokenStore`.

        Raises:
            ValueError: as for :class:`TrainingData`.
        """
        self.name = name
        self._config = config
        (source,) = (source for source in config.validation if source.name == name)
        self._store = _open(source, validation_folder(config, name), tokenizer_sha256(config.dir), config, check_files)

    @property
    def samples(self) -> int:
        """Number of windows."""
        return self._store.windows(self._config.sequence_tokens)

    def batches(
        self, rank: int, world_size: int, batch_samples: int, limit_samples: int | None = None
    ) -> Iterator[Batch]:
        """This rank's batches; every rank gets the same number of them, each of ``batch_samples`` rows.

        All ranks together see ``limit_samples`` windows (all of them if None) once each, evenly spread over the set,
        whose first ones might be of one document. Padding rows hold zeros, have sample id -1 and only -100 as targets.
        """
        samples = self.samples if limit_samples is None else min(limit_samples, self.samples)
        length = self._config.sequence_tokens
        nothing = (np.zeros(length + 1, np.int64), np.zeros(0, np.int64))
        for places in batch_places(rank, world_size, batch_samples, samples):
            ids = np.where(places < samples, places * self.samples // samples, NO_SAMPLE)
            rows = [self._store.window(number, length) if number >= 0 else nothing for number in ids.tolist()]
            yield _batch(rows, ids, self._config)


def open_all(
    config: DataConfig, pin_memory: bool = False, check_files: bool = True
) -> tuple[TrainingData, list[ValidationSet]]:
    """All that a stage-one run reads, with the arguments of :class:`TrainingData`.

    Raises:
        ValueError: as for :class:`TrainingData`; also if the shards' vocabulary is not the config's.
    """
    data = TrainingData(config, pin_memory, check_files)
    data.require_vocabulary(config.tokenizer.vocab_size)
    return data, [ValidationSet(config, source.name, check_files) for source in config.validation]


def batch_places(rank: int, world_size: int, batch_samples: int, samples: int) -> Iterator[np.ndarray]:
    """The places in each of a rank's batches, int64 [B], equally many on every rank; from ``samples`` on, padding."""
    assert 0 <= rank < world_size and batch_samples >= 1
    for first in range(0, samples, world_size * batch_samples):
        yield first + rank * batch_samples + np.arange(batch_samples)


def int64_tensor(array: np.ndarray, pin_memory: bool = False) -> Tensor:
    """``array`` as a contiguous tensor, pinned if asked."""
    made = torch.from_numpy(np.ascontiguousarray(array, np.int64))
    return made.pin_memory() if pin_memory else made


def step_sample_ids(
    consumed: int, global_batch: int, rank: int, world_size: int, micro_batch: int, accumulation: int
) -> list[range]:
    """What ``rank`` takes in the step after ``consumed`` samples: ``micro_batch`` samples per micro-step.

    Together the ranks take ``consumed`` up to ``consumed + global_batch``, so that the samples of a step are the same
    at any world size and micro-batch.

    Raises:
        ValueError: the three numbers do not multiply to ``global_batch``.
    """
    if micro_batch * accumulation * world_size != global_batch:
        raise ValueError(
            f"micro_batch {micro_batch} x accumulation {accumulation} x world size {world_size} = "
            f"{micro_batch * accumulation * world_size}, but the global batch is {global_batch}; make them equal"
        )
    first = [consumed + (micro_step * world_size + rank) * micro_batch for micro_step in range(accumulation)]
    return [range(start, start + micro_batch) for start in first]


def _open(
    source: SourceConfig, folder: Path, expected_tokenizer: str, config: DataConfig, check_files: bool
) -> TokenStore:
    store = TokenStore(folder, expected_tokenizer, check_files)
    require_configured(store.manifest, folder, config, source)
    if not store.windows(config.sequence_tokens):
        raise ValueError(
            f"{folder} holds {store.tokens} tokens, but one window takes data.sequence_tokens + 1 = "
            f"{config.sequence_tokens + 1}; add text or lower sequence_tokens"
        )
    return store


def _require_one_vocabulary(stores: Sequence[TokenStore]) -> None:
    """Refuse sources if the files beside the tokenizer, which its hash leaves out, changed between preparing them."""
    first, *others = ((store.folder, store.manifest.origin["vocabulary"]) for store in stores)
    for folder, vocabulary in others:
        if differ := [key for key in sorted(vocabulary.keys() & first[1].keys()) if vocabulary[key] != first[1][key]]:
            one, other = (", ".join(f"{key} {of[key]}" for key in differ) for of in (first[1], vocabulary))
            raise ValueError(
                f"{first[0]} was prepared with the tokenizer's {one}, but {folder} with {other}: the files beside the "
                "tokenizer changed in between; restore them, remove the folder made with the wrong ones, and prepare "
                "again"
            )


def _batch(
    rows: list[tuple[np.ndarray, np.ndarray]],
    sample_ids: np.ndarray,
    config: DataConfig,
    pin_memory: bool = False,
    sources: np.ndarray | None = None,
) -> Batch:
    """Collate windows (tokens [T+1], document ends [E]); a row with sample id -1 gets no targets."""
    tokens = np.stack([row for row, _ in rows])
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    targets[sample_ids == NO_SAMPLE] = IGNORE_INDEX
    places = np.arange(config.sequence_tokens)
    numbers = [np.searchsorted(ends, places, side="right") for _, ends in rows]
    if config.confine_attention:
        for row, (_, ends) in enumerate(rows):
            targets[row, ends - 1] = IGNORE_INDEX
    # A row's document d > 0 starts at its end number d - 1; one that began before the window starts at 0.
    starts = [np.concatenate([[0], ends])[number] for (_, ends), number in zip(rows, numbers, strict=True)]
    tensor = partial(int64_tensor, pin_memory=pin_memory)
    return Batch(
        tokens=tensor(inputs),
        targets=tensor(targets),
        sample_ids=tensor(sample_ids),
        documents=tensor(np.stack(numbers)) if config.confine_attention else None,
        positions=tensor(places - np.stack(starts)) if config.restart_positions else None,
        sources=None if sources is None else tensor(sources),
    )
