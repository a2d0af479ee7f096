"""Downstream tasks during training: read before the run starts, run by all ranks on the live engine.

Local files need nothing but the tokenizer; other names are lm-evaluation-harness's, which is imported only for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.questions import find_tasks
from data.tokenization import load_text_tokenizer
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.preflight import require_harness
from trainer.tasks.answers import answer
from trainer.tasks.files import FileTask, Score
from trainer.tasks.scorer import NO_LIKELIHOOD, Scorer

if TYPE_CHECKING:
    from trainer.tasks.harness import HarnessTasks


class Outcome:
    """The result of one evaluation of all tasks.

    Attributes:
        scores: by task.
        seconds: how long it took.
        share: share of the time since this start of the run that went into tasks.
    """

    def __init__(self, scores: dict[str, Score], seconds: float, share: float) -> None:
        self.scores, self.seconds, self.share = scores, seconds, share

    @property
    def scalars(self) -> dict[str, float]:
        """By metric name, ``tasks/piqa/acc``."""
        found = {f"tasks/{task}/{name}": v for task, score in self.scores.items() for name, v in score.metrics.items()}
        return found | {"tasks/seconds": self.seconds, "tasks/share_of_time": self.share}

    def sentence(self) -> str:
        """One metric of each task with its standard error, and the time that all took."""
        parts = []
        for task, score in self.scores.items():
            name, value = next(iter(score.metrics.items()))
            error = f" ± {score.errors[name]:.3f}" if name in score.errors else ""
            parts.append(f"{task} {name} {value:.3f}{error}")
        return f"{', '.join(parts)}; {self.seconds:.1f} s, tasks so far {self.share:.1%} of this start's time"


def open_tasks(config: StageConfig, tokenizer_folder: Path, world: World) -> LiveTasks | None:
    """:class:`LiveTasks`, if the config has any."""
    return LiveTasks(config, tokenizer_folder, world) if config.train.evaluation.tasks else None


class LiveTasks:
    """The tasks of ``train.evaluation.tasks``.

    Args:
        config: the run's.
        tokenizer_folder: holds the model's tokenizer.
        world: this process among all ranks.

    Raises:
        ValueError: if a task or the tokenizer cannot be loaded, or the model is not causal; on every rank.
    """

    def __init__(self, config: StageConfig, tokenizer_folder: Path, world: World) -> None:
        wanted = config.train.evaluation
        config.model.require_causal(NO_LIKELIHOOD)
        self.config, self.world = config, world
        self.tokenizer = load_text_tokenizer(tokenizer_folder)
        window_tokens = config.data.sequence_tokens
        files, self._names = find_tasks(wanted.tasks)
        limits = (window_tokens, wanted.task_limit, wanted.task_shots)
        self.files = [FileTask(path, self.tokenizer, *limits) for path in files]
        self._harness: HarnessTasks | None = None
        if self._names:
            require_harness()
            from trainer.tasks.harness import HarnessTasks  # lm_eval

            self._harness = HarnessTasks(self._names, wanted.task_limit, wanted.task_shots)
        self._spent_s, self._opened_s = 0.0, time.perf_counter()

    def sentence(self) -> str:
        """Which tasks will be run, and how many of their contexts are truncated."""
        parts = [f"{task.name} ({len(task.lines):,} questions{_cut(task)})" for task in self.files]
        return f"tasks beside evaluations: {', '.join([*parts, *self._names])}"

    def run(self, engine: Any, progress: Callable[[int], object] = lambda rows: None) -> Outcome:
        """Run all tasks; collective, and the same outcome on every rank. The engine is left in training mode.

        ``progress`` is called on every rank alike after each batch that all have done, with its number of rows.
        """
        start_s = time.perf_counter()
        engine.eval()
        try:
            scores = self._scores(engine, progress)
        finally:
            engine.train()
        seconds = time.perf_counter() - start_s
        self._spent_s += seconds
        return Outcome(scores, seconds, self._spent_s / (time.perf_counter() - self._opened_s))

    def _scores(self, engine: Any, progress: Callable[[int], object]) -> dict[str, Score]:
        data, train = self.config.data, self.config.train
        lockstep = self.config.deepspeed.zero_stage == 3  # a pass needs all ranks, and the engine
        model = engine if lockstep else engine.module
        scorer = Scorer(model, train.micro_batch_samples * data.sequence_tokens, self.world)
        windows = [window for task in self.files for window in task.windows]
        prompts = [prompt for task in self.files for prompt in task.prompts]
        scored = iter(scorer.score(windows, progress))
        answered = iter(answer(model, self.tokenizer, prompts, self.world, lockstep, progress))
        found = {}
        for task in self.files:
            own = [next(scored) for _ in task.windows], [next(answered) for _ in task.prompts]
            found[task.name] = task.judge(*own)
        if self._harness is not None:
            found |= self._harness.run(scorer, self.tokenizer, data.sequence_tokens, lockstep, progress)
        return found


def _cut(task: FileTask) -> str:
    return f", {task.cut} of them without the start of their context" if task.cut else ""
