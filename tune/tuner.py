"""What stage two adds to the trainer: evaluation of every late layer beside the ensemble, and saving the adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from data.files import write_atomically
from data.tokenization import TextTokenizer
from model.decoder import Decoder
from trainer.distributed import World
from trainer.step import set_schedules
from trainer.tasks.live import LiveTasks
from trainer.trainer import Trainer
from tune.adapter_files import save_adapter
from tune.batches import ExampleSet, TuningData
from tune.classes import token_classes
from tune.config import TuneConfig
from tune.evaluate import ExamplesEvaluation, evaluate_examples
from tune.late_norms import fit_norms
from tune.report import answers, scalars, table
from tune.vote_figure import vote_figure

ANSWERS = "answers-{}.json"
"""File of a test set's answers: for each candidate, 1 for every example that it gets right and 0 otherwise."""


class Tuner(Trainer):
    """A stage-two run in progress: see :class:`trainer.trainer.Trainer`."""

    config: TuneConfig

    def __init__(
        self,
        config: TuneConfig,
        config_path: Path,
        data: TuningData,
        sets: Sequence[ExampleSet],
        world: World,
        decoder: Decoder,
        tokenizer: TextTokenizer,
        tasks: LiveTasks | None = None,
    ):
        def start() -> None:
            if config.ensemble is not None and config.ensemble.start == "fit":
                fit_norms(decoder, data, config.data.sequence_tokens, world)

        super().__init__(config, config_path, data.fingerprint, sets, world, decoder, start, tasks)
        self._sets = sets
        self._classes = token_classes(tokenizer)

    def evaluate_all(self) -> None:
        """Each late layer, the ensemble and the oracle, then losses and densities as in stage one."""
        for example_set in self._sets:
            self._evaluate(example_set, "validation")
            self.stop.raise_if_agreed(self.world)
        super().evaluate_all()

    def test(self, sets: Sequence[ExampleSet]) -> bool:
        """Evaluate ``sets`` as ``test``, with the whole table in the log and answers by example in a file.

        False if asked to stop before all was done: the next start tests again.
        """
        for example_set in sets:
            if self.stop.agreed(self.world):
                self.stop_here()
                return False
            self.run.beat(self.step, "evaluating")
            set_schedules(self.engine, self.budget, self.config.train.progress(self.step))
            evaluation = self._evaluate(example_set, "test")
            if self.world.is_main:
                content = json.dumps(answers(evaluation)).encode()
                write_atomically(self.run.path / ANSWERS.format(example_set.name), content)
            self.log.info(f"test {example_set.name} after {self.step:,} steps\n{table(evaluation)}")
        return True

    def save_adapter(self, peft: PeftModel | None) -> None:
        """Write the weights trained beside the backbone to ``RUN/adapter``, in PEFT's format; collective."""
        self.run.beat(self.step, "saving")
        folder = self.run.path / "adapter"
        if save_adapter(peft, self.engine.module, folder, self.world):
            self.log.info(f"adapter saved in {folder}")

    def _evaluate(self, example_set: ExampleSet, group: str) -> ExamplesEvaluation:
        evaluation = evaluate_examples(self.engine, example_set, self._classes, self.config, self.world)
        self.metrics.log_scalars(self.step, scalars(evaluation, group))
        if self.config.ensemble is not None:
            self.metrics.draw(f"vote/{group}/{example_set.name}", self.step, lambda: vote_figure(evaluation))
        self.log.info(f"step {self.step:>6,}  {group} {example_set.name}: {evaluation.sentence()}")
        return evaluation
