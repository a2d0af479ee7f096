"""The demo's stages: the command of each, exactly as a user would type it, and what it produces."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.files import read_json, write_json
from trainer.checkpoints import manifest
from trainer.checkpoints.layout import checkpoint_at, checkpoints_of
from trainer.config import PretrainConfig
from trainer.config_blocks import TrainConfig
from trainer.heartbeat import read_beats
from trainer.local_ranks import deepspeed_launcher
from tune.config import TuneFile


@dataclass(frozen=True)
class DemoStage:
    """One command.

    Attributes:
        name: a word or two.
        what: what it does, in half a sentence.
        command: to run.
        product: what exists once it is done; None if it is quick, and repeated each time.
        start: its share of the demo's time outside training; all shares add up to 1.
        train: for a stage that trains, its block of the config.
        tokens: that it trains on.
    """

    name: str
    what: str
    command: list[str]
    start: float
    product: Path | None = None
    train: TrainConfig | None = None
    tokens: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps; 0 if it does not train."""
        return 0 if self.train is None else self.train.steps

    def step(self) -> int:
        """Optimiser steps done, from its first rank's heartbeat."""
        if self.train is None:
            return 0
        beats = read_beats(Path(str(self.train.run_dir)) / "heartbeat")
        return beats[0].step if beats else 0


@dataclass(frozen=True)
class Demo:
    """Configs of both stages and where things go."""

    config: Path
    tune_config: Path
    stage_one: PretrainConfig
    stage_two: TuneFile

    @property
    def run_dirs(self) -> list[Path]:
        """Run folders of both stages."""
        return [Path(str(train.run_dir)) for train in (self.stage_one.train, self.stage_two.train)]

    @property
    def export(self) -> Path:
        """The folder in Hugging Face's format."""
        return self.run_dirs[0].with_name(f"{self.run_dirs[0].name}-hf")

    @property
    def folders(self) -> list[Path]:
        """Everything that the demo creates: ``runs/demo``, ``runs/demo-data`` and the like, no data from elsewhere."""
        run = self.run_dirs[0]
        folders = [run, Path(self.stage_one.data.dir), self.run_dirs[1], self.export]
        return [folder for folder in folders if folder == run or str(folder).startswith(f"{run}-")]

    def possible_ranks(self) -> list[int]:
        """The numbers of ranks among which the global batches of both stages can be divided."""
        one, two = self.stage_one, self.stage_two

        def divides(ranks: int) -> bool:
            with suppress(ValueError):
                return one.accumulation(ranks) > 0 and two.train.accumulation(ranks, two.deepspeed) > 0
            return False

        most = one.train.global_batch_samples * one.deepspeed.sequence_parallel
        return [ranks for ranks in range(1, most + 1) if divides(ranks)]

    def stages(self, processes: int, port: int, gpus: str | None = None) -> list[DemoStage]:
        """All stages in order; ``processes`` ranks meet at ``port``, on ``gpus`` if given."""
        python, launcher = [sys.executable, "-m"], [*deepspeed_launcher(processes, port, gpus), "--module"]
        (run, tuned), data = self.run_dirs, self.stage_one.data.dir
        validation = self.stage_two.data.validation[0].files[0]
        one, two = self.stage_one.train, self.stage_two.train
        return [
            DemoStage("tokenizer", "learns pieces of text", [*python, "data.tokenizer", str(self.config)], 0.03),
            DemoStage("data", "text to tokens", [*python, "data.prepare", str(self.config)], 0.04),
            DemoStage(
                "stage one",
                f"{one.steps} steps of pretraining on {processes} ranks",
                [*launcher, "pretrain.train", str(self.config)],
                0.25,
                checkpoint_at(checkpoints_of(run), one.steps) / manifest.NAME,
                one,
                one.samples * self.stage_one.data.sequence_tokens,
            ),
            DemoStage("examples", "lines of code with open brackets", [*python, "launch.demo.examples", data], 0.03),
            DemoStage(
                "stage two",
                f"{two.steps} steps of learning to close them, the last layers voting",
                [*launcher, "tune.train", str(self.tune_config)],
                0.4,
                checkpoint_at(checkpoints_of(tuned), two.steps) / manifest.NAME,
                two,
                two.samples * self.stage_two.data.sequence_tokens,
            ),
            DemoStage(
                "export",
                "Hugging Face's format, compared with the original",
                [*python, "convert.to_hf", str(tuned), str(self.export)],
                0.14,
                self.export,
            ),
            DemoStage(
                "answers",
                "of the export, in transformers",
                [*python, "launch.demo.answers", str(self.export), validation],
                0.11,
            ),
        ]


class Record:
    """Which stages are done, and the seconds that each took; kept in a file, so that a stopped demo can resume.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._stages: dict[str, dict[str, float | bool]] = read_json(path) if path.exists() else {}

    def seconds(self, stage: DemoStage) -> float:
        """Seconds that ``stage`` took, over all its starts."""
        return float(self._stages.get(stage.name, {}).get("seconds", 0.0))

    def is_done(self, stage: DemoStage) -> bool:
        """True if ``stage`` is done and its product still exists."""
        if stage.product is not None and not stage.product.exists():
            return False
        # An export gets its name only when it is complete; a training run still evaluates after its last checkpoint.
        whole = stage.product is not None and stage.train is None
        return whole or bool(self._stages.get(stage.name, {}).get("done", False))

    def add(self, stage: DemoStage, seconds: float, done: bool) -> None:
        """Record that ``stage`` ran for ``seconds``."""
        self._stages[stage.name] = {"seconds": self.seconds(stage) + seconds, "done": done}
        write_json(self._path, self._stages)
