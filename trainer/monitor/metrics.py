"""Metrics: one line of JSON per logged step, the same values to the run's trackers, a progress line on the terminal.

Names are ``group/name``; docs/training.md has the table with units. Only rank 0 writes; every metric is already reduced
over all ranks. ``metrics.jsonl`` has each step once: all metrics found after a step go into one line, which is written
when the next step begins. A resumed run drops the lines after its checkpoint, which holds what was not written yet; so
a stop changes no mean.
"""

from __future__ import annotations

import io
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from data.append_only import Lines
from data.files import write_atomically
from data.stages import describe_shares, stage_after
from model.budget import Budget
from model.flops import Routed, executed_flops
from settings.words import duration
from trainer import git_state
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.evaluate import Evaluation
from trainer.log import logger_of_run
from trainer.monitor import metrics_file
from trainer.monitor.scalars import (
    density_scalars,
    imbalance_scalars,
    loss_scalars,
    mean,
    source_scalars,
    speed_scalars,
    vote_scalars,
)
from trainer.monitor.trackers.all import Trackers
from trainer.monitor.trackers.interface import Opening
from trainer.run_folder import RunFolder
from trainer.tally import StepResult, Tally

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONG_S = 60.0
"""If the first line takes longer than this, the pace is logged after the second step."""


class Metrics:
    """Collects a run's metrics and writes them.

    Args:
        config: the run's config.
        run: its folder.
        world: this process; only rank 0 writes.
        resumed_at: optimiser steps done before this start; None for a fresh one.
        peak_flops: peak FLOP/s of one device, for MFU; raised if steps turn out to reach more.
        history_of: name of the validation set whose densities the routing picture shows.
        late_layers: how many last layers vote; 0 without an ensemble.
    """

    def __init__(
        self,
        config: StageConfig,
        run: RunFolder,
        world: World,
        resumed_at: int | None,
        peak_flops: float,
        history_of: str | None = None,
        late_layers: int = 0,
    ):
        self._history_of = history_of
        self.late_layers = config.model.last_layers(late_layers)
        self.config, self.run, self.world, self.peak_flops = config, run, world, peak_flops
        self.log = logger_of_run()
        self.sites = config.model.sites
        self.sources = [source.name for source in config.data.sources]
        self._mixture = config.data.mixture()
        self._since_log: list[StepResult] = []
        self._clock = time.perf_counter()
        self._elapsed_before_s = self._waited_s = self._waited_so_far_s = 0.0
        self._line: dict[str, Any] = {}
        self._reopened_at: int | None = None  # where the line of the step resumed from begins in the file
        self._history: list[tuple[int, list[float]]] = []
        self._evaluated_at: set[int] = set()
        self._trackers: Trackers | None = None
        self._bar: tqdm | None = None
        self._reported_images = self._reported_peak = False
        step = self._first_step = resumed_at or 0
        if world.is_main:
            self._keep_lines_up_to(-1 if resumed_at is None else step)
            self._lines = Lines(run.metrics, self.log.warning)
            log = config.train.log
            opening = Opening(run.path, log.project, config.model_dump(mode="json"), git_state.commit(), resumed_at)
            self._trackers = Trackers(log.trackers, opening, run.description, run.record, self.log.warning)

    def begin(self) -> None:
        """Count step time from here on, and show a progress bar if rank 0 writes to a terminal."""
        self._clock = time.perf_counter() - self._elapsed_before_s
        if self.world.is_main and sys.stdout.isatty():
            total, done = self.config.train.last_step, self._first_step
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, leave=False, file=sys.stdout)

    def close_bar(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def log_step(self, step: int, samples: int, result: StepResult, lr: float, budget: Budget, waited_s: float) -> None:
        """Record a step; ``step`` and ``samples`` are the steps and windows done, this one included.

        Every ``log.every_steps`` and at the last step, log the means since the last line.
        """
        self._since_log.append(result)
        self._waited_so_far_s = waited_s
        if self._bar is not None:
            self._bar.update()
        if not self.config.train.is_logged(step):
            self._estimate_end(step)
            return
        now = time.perf_counter()
        elapsed_s, self._clock = now - self._clock, now
        waited_s, self._waited_s = waited_s - self._waited_s, waited_s
        line = self._training_line(step, lr, budget, elapsed_s, waited_s)
        line["train/tokens"] = samples * self.config.data.sequence_tokens
        if len(self._mixture) > 1:
            line["data/stage"] = stage_after(self._mixture, samples, self.config.data.skip_ranges)
        self._since_log = []
        self._add(step, line)
        self._tell(step, line)

    def _estimate_end(self, step: int) -> None:
        """After the second step of this start, log the pace if the first line is more than a minute away."""
        if step != self._first_step + 2:
            return
        every = self.config.train.log.every_steps
        pace_s = (time.perf_counter() - self._clock) / len(self._since_log)
        if pace_s * (every - step % every) > _LONG_S:
            left = duration((self.config.train.last_step - step) * pace_s)
            self.log.info(f"step {step:>6,}  {pace_s:.1f} s a step so far, {left} left; a line every {every} steps")

    def mark_stage(self, step: int, number: int) -> None:
        """Mark ``step`` as the first with samples of stage ``number`` of the mixture."""
        stage = self._mixture[number]
        message = f"{stage.name} begins with sample {stage.first:,}: {describe_shares(stage, self.sources)}"
        self.log.info(f"step {step:>6,}  data.stages: {message}")
        self._add(step, {"data/stage": number})
        if self._trackers is not None:
            self._trackers.text(step, "data/stages", message)

    def log_evaluation(self, step: int, evaluations: list[Evaluation]) -> None:
        """Log validation losses and densities, and draw the routing."""
        line: dict[str, Any] = {}
        for evaluation in evaluations:
            prefix = f"validation/{evaluation.name}"
            line[f"{prefix}/loss"] = evaluation.greedy.loss
            if evaluation.noisy is not None:
                line[f"{prefix}/loss_with_noise"] = evaluation.noisy.loss
                line[f"{prefix}/loss_greedy_minus_noisy"] = evaluation.greedy.loss - evaluation.noisy.loss
            if self.sites:
                line[f"{prefix}/density"] = mean(evaluation.greedy.density)
                line |= {f"{prefix}/density/{s}": d for s, d in zip(self.sites, evaluation.greedy.density, strict=True)}
            line[f"{prefix}/flops_per_token"] = self._forward_flops(evaluation.greedy.routed)
        self._add(step, line)
        for evaluation in evaluations:
            self.log.info(_validation_sentence(step, evaluation))
        if evaluations and evaluations[0].executed is not None:
            self._draw(step, evaluations[0])

    def log_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Log a stage's own scalars."""
        self._add(step, dict(scalars))

    def draw(self, name: str, step: int, figure: Callable[[], Figure]) -> None:
        """Send a stage's own picture to the trackers; save it beside ``metrics.jsonl``, with ``-`` for ``/``."""
        if self._trackers is None or not self.config.train.log.images:
            return
        content = io.BytesIO()
        figure().savefig(content, dpi=110, format="png")
        self._trackers.image(step, name, content.getvalue())
        try:
            (self.run.path / f"{name.replace('/', '-')}.png").write_bytes(content.getvalue())
        except OSError as error:
            if not self._reported_images:
                self.log.warning(
                    f"pictures in {self.run.path} cannot be written ({error.strerror}) and are skipped; the trackers "
                    "get them"
                )
            self._reported_images = True

    def has_evaluation(self, step: int) -> bool:
        """True if ``step`` was evaluated before a resume; the same on every rank."""
        return bool(self.world.broadcast_object(step in self._evaluated_at))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what happens inside (saving, evaluating) from the step time."""
        start = time.perf_counter()
        try:
            yield
        finally:  # an evaluation may be cut short
            self._clock += time.perf_counter() - start

    def write_line(self) -> None:
        """Write the metrics of the last step as its line, if there are any."""
        if self._trackers is not None and self._line:
            self._lines.add(metrics_file.text_of(self._line), self._reopened_at)
            self._reopened_at = None
        self._line = {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resume to continue in the middle of a line: see :meth:`load_state_dict`."""
        return {
            "line": self._line,
            "sources": self.sources,
            "since_log": [asdict(result) for result in self._since_log],
            "elapsed_s": time.perf_counter() - self._clock,
            "waited_s": self._waited_so_far_s - self._waited_s,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the steps since the last line, and the last step's line if a kill kept it from being written.

        Steps on other sources, which a fork may have, are dropped, because losses are logged by source.
        """
        self._line = state["line"] | self._line
        if state.get("sources", self.sources) != self.sources:
            return
        self._since_log = [_step_result(result) for result in state["since_log"]]
        self._elapsed_before_s = state["elapsed_s"]
        self._clock -= self._elapsed_before_s
        self._waited_s -= state["waited_s"]

    def close(self, phase: str = "ended") -> None:
        """Flush everything to disk and to the trackers; ``phase``, of ``trainer.heartbeat.FINAL``, is how it ended."""
        self.close_bar()
        self.write_line()
        if self._trackers is not None:
            self._lines.close()
            self._trackers.close(phase)

    def _training_line(self, step: int, lr: float, budget: Budget, elapsed_s: float, waited_s: float) -> dict[str, Any]:
        results, config = self._since_log, self.config
        line = {"optimizer/lr": lr, **loss_scalars(results), **speed_scalars(config, results, elapsed_s, waited_s)}
        # Per device: ``speed/tokens_per_s`` is that of all ranks.
        speed = line["speed/tokens_per_s"] / self.world.size
        self._raise_peak(speed * line["flops/executed_per_token"])
        line["speed/mfu_executed"] = speed * line["flops/executed_per_token"] / self.peak_flops
        line["speed/mfu_dense_equivalent"] = speed * line["flops/dense_per_token"] / self.peak_flops
        line["memory/peak_bytes"] = peak_bytes(self.world.device)
        line |= imbalance_scalars(config, results[-1], self.world.size)
        if self.sites:
            line |= density_scalars(self.sites, results, budget, config.train.progress(step - 1))
        if len(self.sources) > 1:
            line |= source_scalars(self.sources, results)
        if self.late_layers:
            line |= vote_scalars(self.late_layers, results)
        return line

    def _raise_peak(self, reached: float) -> None:
        """Raise the peak to what a device has reached, FLOP/s: a lower one was measured on a busy machine, or wrong."""
        if reached <= self.peak_flops:
            return
        if not self._reported_peak:
            self.log.warning(
                f"steps have reached {reached / 1e12:.3g} TFLOP/s a device, above the peak of "
                f"{self.peak_flops / 1e12:.3g} that MFU is measured against, which is raised to that; set "
                "train.log.peak_tflops to the device's peak, or leave it out if it is set"
            )
        self.peak_flops, self._reported_peak = reached, True

    def _forward_flops(self, routed: Routed) -> float:
        return executed_flops(self.config.model, routed) / routed.tokens

    def _add(self, step: int, scalars: dict[str, Any]) -> None:
        """Put ``scalars`` into the line of ``step``, and send them to the trackers."""
        if self._trackers is None or not scalars:
            return
        # JSON has no NaN: values that are not finite become null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in scalars.items()}
        if self._line.get("step", step) != step:
            self.write_line()
        self._line = {"step": step, **self._line, **clean}
        self._trackers.scalars(step, {name: value for name, value in clean.items() if value is not None})

    def _tell(self, step: int, line: dict[str, Any]) -> None:
        density = f"  density {line['density/mean']:.3f}" if self.sites else ""
        left = self.config.train.last_step - step
        self.log.info(
            f"step {step:>6,}  loss {line['train/loss']:.4f}{density}  lr {line['optimizer/lr']:.2e}  "
            f"{line['speed/tokens_per_s']:,.0f} tokens/s"
            + (f"  {duration(left * line['speed/step_s'])} left" if left else "")
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {line['train/loss']:.3f}{density}")

    def _draw(self, step: int, evaluation: Evaluation) -> None:
        self._history.append((step, evaluation.greedy.density))
        if self._trackers is None or not self.config.train.log.images:
            return
        from trainer.monitor.routing_figure import routing_figure  # matplotlib

        router, executed = self.config.model.router, evaluation.executed
        assert router is not None and executed is not None
        steps, densities = zip(*self._history, strict=True)
        self.draw("routing", step, lambda: routing_figure(self.sites, steps, densities, executed, router.density))

    def _keep_lines_up_to(self, step: int) -> None:
        """Drop what a killed run logged after the checkpoint it resumes from; read the densities back.

        The line of the step itself is reopened, and stays in the file until it is rewritten: a start that is refused
        later must not lose it.
        """
        if not self.run.metrics.exists():
            return
        kept = [line for line in metrics_file.read(self.run.metrics) if line["step"] <= step]
        for line in kept:
            self._remember(line)
            if metrics_file.losses_of(line):
                self._evaluated_at.add(line["step"])
        content = metrics_file.content_of(kept)
        write_atomically(self.run.metrics, content)
        if kept and kept[-1]["step"] == step:
            self._line = kept[-1]
            self._reopened_at = len(content) - len(metrics_file.content_of(kept[-1:]))

    def _remember(self, line: dict[str, Any]) -> None:
        prefix = f"validation/{self._history_of}/density/"
        densities = [line[prefix + site] for site in self.sites if prefix + site in line]
        if densities and len(densities) == len(self.sites):
            self._history.append((line["step"], densities))


def _validation_sentence(step: int, evaluation: Evaluation) -> str:
    sentence = f"step {step:>6,}  validation {evaluation.name}: loss {evaluation.greedy.loss:.4f}"
    if evaluation.noisy is not None:
        sentence += f" (with routing noise {evaluation.noisy.loss:.4f})"
    if evaluation.greedy.density:
        density = evaluation.greedy.density
        sentence += f", density {mean(density):.3f} ({min(density):.2f} to {max(density):.2f})"
    return sentence


def _step_result(fields: dict[str, Any]) -> StepResult:
    """The inverse of ``asdict``."""
    tally = fields["tally"]
    return StepResult(**fields | {"tally": Tally(**tally | {"routed": Routed(**tally["routed"])})})


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: on ``device``, or its resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
