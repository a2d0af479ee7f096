"""How much of each source a stage-one run takes in each stage of its mixture, in tokens and epochs."""

from __future__ import annotations

from data.order import StagedMixture
from data.stages import describe_stages
from trainer.config import PretrainConfig, StageConfig


def data_lines(config: StageConfig) -> list[str]:
    """Lines of the plan; none for stage two, whose windows are not known before its examples are read.

    Epochs are given if the shards are prepared.

    Raises:
        ValueError: if the mixture cannot be drawn.
    """
    if not isinstance(config, PretrainConfig):
        return []
    data, samples = config.data, config.train.samples
    mixture = data.mixture()
    taken = StagedMixture(mixture, data.seed).taken(samples, data.skip_ranges).T.tolist()
    windows = _windows(config, samples)
    named = zip((source.name for source in data.sources), taken, windows, strict=True)
    lines = describe_stages(mixture, list(named), data.sequence_tokens)
    if None in windows:
        lines.append("epochs are not known here, where not all shards can be read; launch.doctor says why")
    return [f"{'' if number else 'data':<12}{line}" for number, line in enumerate(lines)]


def _windows(config: PretrainConfig, samples: int) -> list[int] | list[None]:
    """How many windows each source has; None if its shards cannot be read here."""
    from data.batches import TrainingData

    try:
        return [source.windows for source in TrainingData(config.data).summary(samples)]
    except ValueError:
        return [None] * len(config.data.sources)
