"""The ``data`` block of a run's config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from data.placeholders import fill_in_texts
from data.stages import MixtureStage, Stage, require_known_sources, require_one_after_the_other
from settings import PathText, Strict, load, peek

File = Annotated[PathText, AfterValidator(fill_in_texts)]
"""A path, a URL or a glob pattern of them; ``{texts}`` is the folder of the shipped experiments' texts."""


class TokenizerConfig(Strict):
    """The tokenizer, trained or copied. Everything that would change ids after export is fixed in code, not here."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """A ``tokenizer.model`` of SentencePiece, or a ``tokenizer.json``: byte-level BPE if it is trained here."""
    path: PathText | None = None
    """Copy the tokenizer of this folder, such as a Hugging Face checkpoint's, to ``data.dir`` unchanged instead of
    training one; then of the other fields only ``kind`` and ``vocab_size`` have an effect."""
    vocab_size: int = Field(32_000, ge=1, le=2**31 - 1)
    """Number of pieces, including the 256 bytes and the special ones; at least 300 if it is trained here."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """sentencepiece: only ``bpe`` keeps ids exactly the same after conversion to Hugging Face."""
    train_bytes: int = Field(100_000_000, ge=10_000)
    """How many bytes of text to train on, taken evenly from the sources by their weights."""

    @model_validator(mode="after")
    def _type_of_its_kind(self) -> TokenizerConfig:
        if self.kind == "huggingface" and self.model_type != "bpe":
            raise ValueError(
                f"data.tokenizer.model_type {self.model_type} is a SentencePiece type, but kind is huggingface, which "
                "is always bpe; leave model_type out, or set kind to sentencepiece"
            )
        return self


class MixedSource(Strict):
    """What the sources of both stages have: a name, and a weight in the mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Its name in metrics, and in stage one the folder name of its shards."""
    weight: float = Field(1.0, gt=0)
    """Share of samples drawn from this source, relative to the others; 1 each means equal shares, not natural ones."""


class TokensConfig(Strict):
    """Files of token ids, made elsewhere with the tokenizer in ``data.dir``, instead of text (docs/data.md)."""

    dtype: Literal["uint16", "uint32"] | None = None
    """Dtype of a flat file that does not give it itself: nanoGPT's, OLMo's."""
    end_id: int | None = Field(None, ge=0)
    """The id that ends documents in these files, or begins them; the tokenizer's own unless given."""
    field: str = "input_ids"
    """The field or column that holds a document's ids (json, parquet, hub)."""


class SourceConfig(MixedSource):
    """One named corpus: local files or a dataset on the Hub, in any format that ``datasets`` reads."""

    files: list[File] = Field(default_factory=list)
    """Paths, URLs (``s3://bucket/*.jsonl``) or glob patterns (``**`` allowed), read in sorted order; compressed ones
    (.gz .xz .zst) too.
    ``{stdlib}`` stands for the folder of the running Python's standard library, ``{texts}`` for the one that the
    environment variable ``HOPSCOTCH_TEXTS`` names, or ``../shared/data``: what the shipped experiments read."""
    hub: PathText | None = None
    """Instead of files: a dataset's name on the Hub, or a local folder that the ``datasets`` library reads."""
    hub_config: str | None = None
    """With hub: the dataset's configuration."""
    split: str = "train"
    """With hub: the split."""
    format: Literal["text", "json", "parquet", "csv"] | None = None
    """With files: their format; by default inferred from the file name. ``text`` makes each file one document."""
    text_field: str = "text"
    """The field or column that holds a document's text (json, parquet, csv, hub)."""
    tokens: TokensConfig | None = None
    """The files hold token ids, not text."""

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if bool(self.files) == bool(self.hub):
            raise ValueError(f"source '{self.name}' must give exactly one of files and hub")
        if self.tokens is not None and self.format not in (None, "json", "parquet"):
            raise ValueError(
                f"source '{self.name}' has tokens, which cannot be read from {self.format}; leave its format out, or "
                "set it to json or parquet"
            )
        return self


class StreamConfig(Strict):
    """What the data of both stages have: windows of one length in a seeded order, addressed by sample number."""

    sources: Sequence[MixedSource]
    """What to train on."""
    sequence_tokens: int = Field(gt=1)
    """Window length, in tokens: what one sample predicts."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the global shuffle."""
    skip_ranges: list[tuple[int, int]] = Field(default_factory=list)
    """Samples to skip, as [first, end) sample numbers: what to set after going back to before a loss spike."""

    @model_validator(mode="after")
    def _ranges_in_order(self) -> StreamConfig:
        last_end = 0
        for first, end in self.skip_ranges:
            if not last_end <= first < end:
                raise ValueError(
                    f"data.skip_ranges: [{first}, {end}) is empty, negative or begins before the previous range ends "
                    f"({last_end}); give ascending ranges [first, end) that do not overlap"
                )
            last_end = end
        return self

    def mixture(self) -> list[Stage]:
        """Which weights hold from which sample on: the sources' own, from the first one."""
        return [Stage("", 0, [source.weight for source in self.sources])]


def refuse_names_twice(**groups: Sequence[MixedSource]) -> None:
    """Raise ValueError if two sources of a group, such as ``validation``, have one name."""
    for group, sources in groups.items():
        names = [source.name for source in sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"data.{group}: the names {', '.join(twice)} are used more than once; every name must be unique"
            )


class DataConfig(StreamConfig):
    """From raw text to batches."""

    dir: PathText
    """Folder of the tokenizer and the shards: ``tokenizer.json`` or ``tokenizer.model``, ``train/NAME/``,
    ``validation/NAME/``."""
    sources: list[SourceConfig] = Field(min_length=1)
    """What to train on."""
    validation: list[SourceConfig] = Field(default_factory=list)
    """Named validation sets, evaluated separately."""
    stages: list[MixtureStage] = Field(default_factory=list)
    """Parts of the run with weights of their own, such as warm-up, main part and annealing; a single one with the
    sources' weights unless given."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How to train the tokenizer, or which one to copy."""
    shard_tokens: int = Field(100_000_000, ge=1_000)
    """Maximum number of tokens in one shard file."""
    part_bytes: int = Field(500_000_000, ge=1)
    """Approximate size of one part of a source's preparation, in bytes of its files as stored: what one process reads
    and tokenizes, and what tasks share out. A larger file is a part by itself, except Parquet, cut by row group."""
    deduplicate: Literal["none", "exact"] = "none"
    """``exact`` leaves out documents whose text an earlier document of the same source has; reads everything twice."""
    confine_attention: bool = False
    """Attention stays within its document, and no loss is taken on predictions across a document's end."""
    restart_positions: bool = False
    """Rotary positions start from 0 at every document's start."""

    @model_validator(mode="after")
    def _unique_names(self) -> DataConfig:
        refuse_names_twice(sources=self.sources, validation=self.validation)
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> DataConfig:
        if self.stages:
            require_known_sources(self.stages, [source.name for source in self.sources])
            require_one_after_the_other(self.stages, self.sequence_tokens)
        return self

    def mixture(self) -> list[Stage]:
        """Which weights hold from which sample on: those of ``stages``, or the sources' own.

        Raises:
            ValueError: if a stage begins at a share of the run, which :meth:`in_tokens` resolves.
        """
        return [
            Stage(
                stage.name,
                stage.first_sample(self.sequence_tokens),
                [stage.weights.get(source.name, 0.0) for source in self.sources],
            )
            for stage in self.stages
        ] or super().mixture()

    def in_tokens(self, run_samples: int) -> DataConfig:
        """The same, with the shares of the run at which stages begin resolved to tokens, for ``run_samples``.

        Raises:
            ValueError: if stages overlap then.
        """
        if not self.stages:
            return self
        stages = [stage.in_tokens(run_samples, self.sequence_tokens) for stage in self.stages]
        require_one_after_the_other(stages, self.sequence_tokens)
        return self.model_copy(update={"stages": stages})


def load_data(path: Path, overrides: Sequence[str]) -> DataConfig:
    """The ``data`` block of a stage-one config, with ``overrides``.

    Raises:
        ValueError: with one sentence for each mistake; also for a config of stage two.
    """
    if "base" in peek(path):
        raise ValueError(
            f"{path} is a config of stage two, as it has a block 'base', and needs no preparation; tune.train reads "
            "its examples as they are"
        )
    return load(path, overrides, DataConfig, block="data")
