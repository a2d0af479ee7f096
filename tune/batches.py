"""Batches of examples: packed windows, attention confined to each example, loss only on learned tokens.

A window of T inputs holds whole examples; an example of n ids gives n - 1 inputs, each with the next id as its target.
The rest is padded with the end-of-document token, as a separate document without targets::

    inputs     p p p r r | p p r r r r | eos eos
    targets    . . r r E | . r r r r E | .   .         p prompt, r response, E end of document, . none (-100)
    documents  0 0 0 0 0 | 1 1 1 1 1 1 | 2   2
    positions  0 1 2 3 4 | 0 1 2 3 4 5 | 0   1

B: samples in a batch, T: inputs in a window (``data.sequence_tokens``), N: targets of a batch that are not -100,
X: examples, E: entries (an example, or one of its choices, or a piece of a text).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.batches import IGNORE_INDEX, NO_SAMPLE, Batch, MixedStream, SourceSummary, batch_places, int64_tensor
from data.tokenization import TextTokenizer
from settings.words import epochs
from tune.config import ExamplesConfig, ExampleSource
from tune.examples import Examples, read_examples
from tune.packing import Windows, pack


@dataclass(frozen=True)
class ExampleSummary(SourceSummary):
    """Contents of one source, and its share of the tuning."""

    examples: int
    """In windows; each piece of a cut text counts."""
    learned_tokens: int
    """Targets in one epoch."""
    fill: float
    """Share of the windows' inputs that belong to examples; the rest is padding."""
    left_out: int
    """Examples that do not fit into a window, and empty texts."""
    cut_texts: int
    """Texts that were cut into windows."""

    def sentence(self) -> str:
        """All of it in one line."""
        left_out = f", {self.left_out:,} left out" if self.left_out else ""
        cut = f", {self.cut_texts:,} texts cut" if self.cut_texts else ""
        return (
            f"{self.name}: {self.examples:,} examples{left_out}{cut}, {self.tokens:,} tokens, "
            f"{self.learned_tokens:,} of them learned, in {self.windows:,} windows {self.fill:.1%} full, "
            f"{self.share:.0%} of samples, {epochs(self.epochs)}"
        )


@dataclass(frozen=True)
class Scored:
    """What each of a batch's N targets belongs to, in the batch's row-major order."""

    example: np.ndarray
    """int64 [N], number of the example."""
    choice: np.ndarray
    """int64 [N], which of the example's choices; 0 in a set without choices."""
    right: np.ndarray
    """bool [N], the target is part of the right response."""
    token: np.ndarray
    """int64 [N], the target itself."""


class TuningData(MixedStream):
    """All sources, packed, mixed and shuffled."""

    def __init__(self, config: ExamplesConfig, tokenizer: TextTokenizer, pin_memory: bool = False) -> None:
        """Read, encode and pack every source; batches are in pinned memory if asked.

        Raises:
            ValueError: as for :func:`tune.examples.read_examples`.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._pin_memory = pin_memory
        self._sources = [
            _PackedExamples(read_examples(s, config, tokenizer), config, tokenizer) for s in config.sources
        ]
        super().__init__(config, [len(packed.windows) for packed in self._sources])

    @property
    def vocab_size(self) -> int:
        """Upper bound of the token ids, exclusive."""
        return self._tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that determines the tokens and targets of sample i.

        A run resumes exactly only if it is the same. ``skip_ranges`` is left out: it is meant to be changed in a run.
        """
        sources = [{"windows": packed.sha256} for packed in self._sources]
        return self._fingerprint(sources, tokenizer=self._tokenizer.sha256, eos_id=self._tokenizer.eos_id)

    def summary(self, samples: int) -> list[ExampleSummary]:
        """One entry per source, for a run of ``samples``."""
        taken, shares = self._shares(samples)
        return [
            ExampleSummary(
                name=source.name,
                examples=len(packed.examples),
                tokens=len(packed.examples.ids),
                learned_tokens=int(packed.examples.learned.sum()),
                windows=len(packed.windows),
                fill=float(packed.examples.inputs.sum()) / (len(packed.windows) * self._config.sequence_tokens),
                left_out=packed.examples.left_out,
                cut_texts=packed.examples.cut_texts,
                share=share,
                taken=by_stage,
            )
            for source, packed, share, by_stage in zip(
                self._config.sources, self._sources, shares, taken.T.tolist(), strict=True
            )
        ]

    def batch(self, consumed: Sequence[int] | range) -> Batch:
        """The samples at these positions of the run: ``consumed`` is the number of samples taken before each.

        With ``skip_ranges`` set, ``Batch.sample_ids`` runs ahead of ``consumed`` by the skipped samples.
        """
        sample_ids, sources, places = self._located(consumed)
        rows = [self._sources[source].row(window) for source, window in places]
        return _batch(rows, sample_ids, self._pin_memory, sources)


class ExampleSet:
    """One named set to evaluate on: its windows in order, the same every time."""

    def __init__(self, config: ExamplesConfig, source: ExampleSource, tokenizer: TextTokenizer) -> None:
        """Read and encode ``source``, one of ``config.validation`` or ``config.test``, with all of its choices.

        Raises:
            ValueError: as for :func:`tune.examples.read_examples`.
        """
        self.name, self.source = source.name, source
        examples = read_examples(source, config, tokenizer, every_choice=True)
        self.examples = len(examples.right)
        """X, number of examples."""
        self.choices = np.diff(examples.first)
        """int64 [X], responses that each example is scored with; 1 without choices."""
        self.right = examples.right
        """int64 [X], which of the choices is the right one."""
        self.left_out, self.cut_texts = examples.left_out, examples.cut_texts
        """Examples that do not fit into a window, and texts that were cut into windows."""
        self._first = examples.first
        right_entries = self._first[:-1] + self.right
        self._right = _PackedExamples(examples, config, tokenizer, right_entries)
        self._all = self._right if self.most_choices == 1 else _PackedExamples(examples, config, tokenizer)

    @property
    def most_choices(self) -> int:
        """Largest number of choices of any example."""
        return int(self.choices.max())

    def sentence(self) -> str:
        """What it holds, and what was left out or cut."""
        fewest, most = int(self.choices.min()), self.most_choices
        number = f"{most}" if fewest == most else f"{fewest} to {most}"
        choices = f" of {number} choices" if most > 1 else ""
        left_out = f", {self.left_out:,} left out" if self.left_out else ""
        cut = f", {self.cut_texts:,} texts cut" if self.cut_texts else ""
        return f"{self.name}: {self.examples:,} examples{choices}{left_out}{cut}, in {self.samples:,} windows"

    @property
    def samples(self) -> int:
        """Number of windows of the right responses."""
        return len(self._right.windows)

    def batches(
        self, rank: int, world_size: int, batch_samples: int, limit_samples: int | None = None
    ) -> Iterator[Batch]:
        """This rank's batches of the right responses; every rank gets the same number, each of ``batch_samples`` rows.

        All ranks together see ``limit_samples`` windows (all of them if None) once each, evenly spread over the set.
        Rows beyond those are padding, have sample id -1 and only -100 as targets.
        """
        samples = self.samples if limit_samples is None else min(limit_samples, self.samples)
        for places in batch_places(rank, world_size, batch_samples, samples):
            ids = np.where(places < samples, places * self.samples // samples, NO_SAMPLE)
            yield self._right.batch(ids)

    def scored_batches(self, rank: int, world_size: int, batch_samples: int) -> Iterator[tuple[Batch, Scored]]:
        """This rank's batches of every example with each of its choices, and what their targets belong to.

        Every rank gets the same number of batches, each of ``batch_samples`` rows, padded as in :meth:`batches`.
        """
        samples = len(self._all.windows)
        for places in batch_places(rank, world_size, batch_samples, samples):
            ids = np.where(places < samples, places, NO_SAMPLE)
            batch = self._all.batch(ids)
            entries, tokens = self._all.entries(ids, batch)
            example = np.searchsorted(self._first, entries, side="right") - 1
            choice = entries - self._first[example]
            yield batch, Scored(example, choice, choice == self.right[example], tokens)


class _PackedExamples:
    """Examples in windows."""

    def __init__(
        self, examples: Examples, config: ExamplesConfig, tokenizer: TextTokenizer, chosen: np.ndarray | None = None
    ) -> None:
        """Pack the entries ``chosen`` (int64, all of them if None)."""
        self.examples = examples
        self._length, self._eos_id = config.sequence_tokens, tokenizer.eos_id
        chosen = np.arange(len(examples)) if chosen is None else chosen
        windows = pack(examples.inputs[chosen], config.sequence_tokens, config.pack)
        self.windows = Windows(chosen[windows.members], windows.starts)

    @property
    def sha256(self) -> str:
        """Hash of every window's tokens and targets."""
        digest = hashlib.sha256()
        examples, windows = self.examples, self.windows
        for array in (examples.ids, examples.learned, examples.starts, windows.members, windows.starts):
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def row(self, window: int) -> np.ndarray:
        """Tokens, targets, documents and positions of a window, only padding if it is -1: int64 [4, T]."""
        members = self.windows[window] if window != NO_SAMPLE else self.windows.members[:0]
        row = np.empty((4, self._length), np.int64)
        tokens, targets, documents, positions = row
        start = 0
        for number, entry in enumerate(members.tolist()):
            ids, learned = self.examples.entry(entry)
            end = start + len(ids) - 1
            tokens[start:end] = ids[:-1]
            targets[start:end] = np.where(learned[1:], ids[1:], IGNORE_INDEX)
            documents[start:end] = number
            positions[start:end] = np.arange(end - start)
            start = end
        tokens[start:], targets[start:], documents[start:] = self._eos_id, IGNORE_INDEX, len(members)
        positions[start:] = np.arange(self._length - start)
        return row

    def batch(self, windows: np.ndarray) -> Batch:
        """The windows with these numbers, int64 [B], which are also their sample ids."""
        return _batch([self.row(window) for window in windows.tolist()], windows)

    def entries(self, windows: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The entry of each of the batch's targets, and the target: two int64 [N]."""
        assert batch.documents is not None
        targets, documents = batch.targets.numpy(), batch.documents.numpy()
        rows, _ = places = np.nonzero(targets != IGNORE_INDEX)
        # A document's number in its window is that of its entry among the window's members.
        return self.windows.members[self.windows.starts[windows[rows]] + documents[places]], targets[places]


def _batch(
    rows: list[np.ndarray], sample_ids: np.ndarray, pin_memory: bool = False, sources: np.ndarray | None = None
) -> Batch:
    parts = np.stack(rows, axis=1)
    tensor = partial(int64_tensor, pin_memory=pin_memory)
    return Batch(
        tokens=tensor(parts[0]),
        targets=tensor(parts[1]),
        sample_ids=tensor(sample_ids),
        documents=tensor(parts[2]),
        positions=tensor(parts[3]),
        scored_targets=int((parts[1] != IGNORE_INDEX).sum()),
        sources=None if sources is None else tensor(sources),
    )
