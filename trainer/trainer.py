"""The state of a training run in either stage (engine, budget, run folder, metrics), and operations on it.

A trainer is opened on a config, resumes from a checkpoint if the config says so, and then provides methods to take a
step, to save and to validate. The loop around it is ``loop.py``, the same for both stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from data.batches import Batch
from data.skip_ranges import refuse_other_past
from model.budget import Budget
from model.decoder import Decoder
from model.ensemble import Balance
from trainer.checkpoints import resume, retention
from trainer.checkpoints.layout import checkpoint_at
from trainer.checkpoints.mirror import open_mirror
from trainer.checkpoints.rng import rng_state, set_rng_state
from trainer.checkpoints.save import Saver
from trainer.checkpoints.timer import SaveTimer
from trainer.config import StageConfig
from trainer.distributed import World
from trainer.engine import build_engine, set_learning_rate
from trainer.evaluate import Evaluation, ValidationStream, evaluate
from trainer.initial import Fork, GivenWeights, Initial, weights_to_draw
from trainer.log import open_log
from trainer.monitor.metrics import Metrics
from trainer.monitor.orphan import command_again
from trainer.monitor.out_of_memory import is_out_of_memory, out_of_memory
from trainer.monitor.peak_flops import measure_peak
from trainer.monitor.profiler import StepProfiler
from trainer.monitor.step_checks import StepChecks
from trainer.monitor.stop import AskedToStop, StopRequest, is_lost_rank
from trainer.monitor.watchdog import Watchdog
from trainer.precision import resolve_precision, slow_bf16_warning
from trainer.run_folder import RunFolder
from trainer.schedules import lr_ratio
from trainer.step import set_schedules, train_step
from trainer.tally import StepResult
from trainer.tasks.live import LiveTasks

_PATIENCE_AFTER_ERROR_S = 10.0
"""How long a run that failed waits for its mirror; a launcher would end it soon."""


class Trainer:
    """A run in progress.

    Args:
        config: the run's config.
        config_path: the file it was read from, copied into the run folder.
        fingerprint: of everything that decides which tokens a sample holds; a run resumes only if it is the same.
        validation_sets: to evaluate on.
        world: this process among all ranks.
        decoder: the model to train; a freshly initialised one unless given.
        initial: returns what a fresh run starts from; not called on a resume. Without it, or if it returns None, a
            fresh run starts from randomly initialised weights, or those of ``decoder``.
        tasks: downstream tasks to run with the evaluations; none unless given.

    Attributes:
        config: the run's, with its precision decided.
        step, samples: optimiser steps done and windows consumed.
        evaluations: results of :meth:`validate` in this start of the run, by step: those at step 0 and the latest.

    Raises:
        ValueError: if the run folder or a checkpoint does not fit the config.
    """

    def __init__(
        self,
        config: StageConfig,
        config_path: Path,
        fingerprint: str,
        validation_sets: Sequence[ValidationStream],
        world: World,
        decoder: Decoder | None = None,
        initial: Callable[[], Initial | None] | None = None,
        tasks: LiveTasks | None = None,
    ):
        self.tasks = tasks
        self.world, self.fingerprint, self.validation_sets = world, fingerprint, validation_sets
        self.run = RunFolder(str(config.train.run_dir), world.rank)
        self.config = config
        self.step = self.samples = 0
        self._is_stopped = False
        self._hold = ExitStack()  # until the end no other command may write here
        try:
            source, given, precision_message = self._choose(config, initial)
            self.engine = build_engine(self.config, world, decoder, weights_to_draw(source, given))
        except BaseException as error:
            self._hold.close()
            if sentence := self._lack_of_memory(error, "while the engine was built"):
                raise ValueError(sentence) from error
            raise
        try:
            self._open(config_path, source, given, precision_message)
        except BaseException as error:
            self._let_go(error)
            raise

    def _choose(
        self, config: StageConfig, initial: Callable[[], Initial | None] | None
    ) -> tuple[Path | None, Initial | None, str | None]:
        """The checkpoint to continue (own or forked), what ``initial`` returned, and the sentence on the precision."""
        world, checkpoints = self.world, config.train.checkpoint
        if problem := world.broadcast_object(self.run.lock(self._hold) if world.is_main else None):
            raise ValueError(problem)
        found = resume.find_checkpoint(
            self.run.checkpoints, checkpoints.resume, world, checkpoints.mirror, self.run.metrics
        )
        given = initial() if initial is not None and found is None else None
        source = given.checkpoint if isinstance(given, Fork) else found
        self.config, message = resolve_precision(config, world, source)
        return source, given, message

    def _open(
        self, config_path: Path, source: Path | None, given: Initial | None, precision_message: str | None
    ) -> None:
        """Restore the checkpoint ``source`` (own or forked), or start afresh; set up everything around the engine."""
        config, world = self.config, self.world
        self.budget = Budget(config.model, config.data.sequence_tokens, world.device)
        ensemble = self.engine.module.ensemble
        self.balance = Balance(None if ensemble is None else ensemble.config, world.device)
        self.checks = StepChecks(config, self.run.path)
        metrics_state, origin_message = self._restore(source, given)
        self._saved_step = self.step  # what this start began from
        problem = self.run.claim(config, config_path, self._hold) if world.is_main else None
        if problem := world.broadcast_object(problem):
            raise ValueError(problem)
        self.log = open_log(self.run.log, world.is_main)
        self._log_set_up(precision_message)
        self._open_metrics(metrics_state)
        if origin_message:
            self.log.info(origin_message)
        tick = self.run.heartbeat.tick
        origin = given.description if given else resume.origin_of(source, world)
        own = source if given is None else None
        self.mirror = open_mirror(self.run.checkpoints, self.run.metrics, config, world, self.log, own)
        self.saver = Saver(
            self.run.checkpoints, self.fingerprint, config, world, self.log.info, tick, origin, self.mirror, own
        )
        self.save_timer = SaveTimer(config.train.checkpoint.every_minutes)
        self.stop = StopRequest(tell=world.is_main)
        # A forward pass is progress: of a long accumulation, and of an evaluation of either stage.
        self.engine.module.register_forward_hook(lambda *_: tick())
        self.watchdog = Watchdog(self.run, config.train.stall_timeout_s, self.stop.request, world.size)
        profile = config.train.profile
        self._profiler = None if profile is None else StepProfiler(profile, self.run.path, world.rank, world.device)
        self.evaluations: dict[int, list[Evaluation]] = {}  # with pictures of windows, so not all of a long run
        self.watchdog.start()

    def _restore(self, source: Path | None, given: Initial | None) -> tuple[dict[str, Any] | None, str | None]:
        """Load what the run starts from; return the checkpoint's metrics state, and a sentence for the log."""
        if source is None:
            if isinstance(given, GivenWeights):
                given.put_into(self.engine, self.world)
            return None, None if given is None else given.description
        fingerprint = self.fingerprint if given is None else None
        state, change = resume.load(self.engine, source, fingerprint, self.config, self.world)
        self._take_back(state)
        message = f"resumed from {source} at step {self.step:,}" if given is None else given.description
        message += f" ({change}: equal to rounding, not bit by bit)" if change else ""
        if given is None and (changed := resume.changed_settings(source, self.config)):
            message += f"; settings changed since: {', '.join(changed)}"
        return state["metrics"], message

    def _log_set_up(self, precision_message: str | None) -> None:
        """Log how the run is set up on this machine, and warnings."""
        if precision_message:
            self.log.info(precision_message)
        if self.tasks is not None:
            self.log.info(self.tasks.sentence())
        if warning := slow_bf16_warning(self.config, self.world):
            self.log.warning(warning)
        size = retention.checkpoint_bytes(self.engine.module, self.config)
        if warning := retention.check_plan(size, self.run.checkpoints, self.config.train, self.world):
            self.log.warning(warning)

    def _open_metrics(self, state: dict[str, Any] | None) -> None:
        """Open the metrics, restored from a checkpoint's ``state`` if there is one."""
        config, sets = self.config, self.validation_sets
        peak_tflops = config.train.log.peak_tflops
        peak_flops = peak_tflops * 1e12 if peak_tflops else measure_peak(self.world, config.train.precision)
        resumed_at = None if state is None else self.step
        history_of = sets[0].name if sets else None
        with self.run.writing():
            self.metrics = Metrics(
                config, self.run, self.world, resumed_at, peak_flops, history_of, self.balance.layers
            )
        if state is not None:
            self.metrics.load_state_dict(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Flush the metrics and record how this rank has ended.

        Raises:
            ValueError: in place of an out-of-memory error: what holds the memory, and what helps.
        """
        if self._profiler is not None:
            self._profiler.close()
        doing = self.run.heartbeat.phase
        phase = "stopped" if self._is_stopped else "ended"
        if error is not None:
            self.saver.end()
            phase = "lost" if is_lost_rank(error) else "failed"
        self.watchdog.stop()
        self.metrics.write_line()  # a wait for the mirror may be cut short
        if self.mirror is not None:
            patience_s = self.config.train.checkpoint.mirror_wait_s
            self.mirror.close(patience_s if error is None else min(patience_s, _PATIENCE_AFTER_ERROR_S))
        self.run.beat(self.step, phase)
        self.run.heartbeat.write()
        self.metrics.close(phase)
        sentence = self._lack_of_memory(error, f"in step {self.step + 1:,} ({doing})")
        self._let_go(error)
        if sentence:
            raise ValueError(sentence) from error

    def _lack_of_memory(self, error: BaseException | None, where: str) -> str | None:
        """What holds the memory if ``error`` is an out-of-memory error; None for any other."""
        if error is None or not is_out_of_memory(error):
            return None
        return out_of_memory(error, getattr(self, "engine", None), self.config, self.world, where, self.run.path)

    def _let_go(self, error: BaseException | None) -> None:
        """Release the run folder, and the engine, whose hooks would affect another one in this process.

        If a rank is lost the engine stays: destroying it would wait for the device, and so for that rank's collectives.
        """
        if error is None or not is_lost_rank(error):
            self.engine.destroy()
        self._hold.close()

    def train_step(self, batches: Sequence[Batch], waited_s: float) -> StepResult:
        """One optimiser step on this rank's micro-batches; counted and logged.

        Args:
            batches: this rank's micro-batches of the step.
            waited_s: seconds that training has waited for data since its start.

        Raises:
            ValueError: as :meth:`end_step`.
        """
        lr = self.begin_step()
        stop = self.stop.requested or self.saver.failed
        save_due = self.world.is_main and self.save_timer.due
        result = train_step(
            self.engine, batches, self.budget, self.config, self.world, self.step, stop, self.balance, save_due
        )
        self.end_step(result, lr, waited_s)
        return result

    def begin_loading(self) -> None:
        """Called between two steps, before the next one's data are loaded."""
        if self._profiler is not None:
            with self.metrics.paused():
                self._profiler.between_steps(self.step, self.engine, self.run.heartbeat, self.metrics)
        self.run.beat(self.step, "loading")

    def begin_step(self) -> float:
        """Set heartbeat and learning rate for the next step; returns the rate."""
        self.metrics.write_line()
        self.run.beat(self.step, "training")
        ratio = lr_ratio(self.config.train.schedule, self.step, self.config.train.steps)
        set_learning_rate(self.engine, ratio)
        return self.config.train.optimizer.lr * ratio

    def end_step(self, result: StepResult, lr: float, waited_s: float) -> None:
        """Count the step, log it, and end the run if its checks say so.

        Raises:
            ValueError: after ``train.max_bad_steps`` bad steps in a row, or as many steps of a spike if spikes stop the
                run.
        """
        self.step += 1
        self.samples += self.config.train.global_batch_samples
        stage = self.checks.stage_begun(self.samples)
        if stage is not None:
            self.metrics.mark_stage(self.step, stage)
        self.metrics.log_step(self.step, self.samples, result, lr, self.budget, waited_s)
        verdict = self.checks.judge(self.step, self.samples, result)
        if verdict.warning:
            self.log.warning(verdict.warning)
        if verdict.error:
            self._finish_saving()
            raise ValueError(verdict.error())

    def save(self, wait: bool) -> None:
        """Write a checkpoint, unless this step's is there; then remove those that are no longer kept.

        Args:
            wait: for that to finish, even if the config lets training continue meanwhile.

        Raises:
            ValueError: if it could not be written. A failure of the save before only logs a warning: the state, by now
                a later one, is still in memory, and the reason may be gone.
        """
        self.run.beat(self.step, "saving")
        self.save_timer.restart()
        state: dict[str, Any] = {"step": self.step, "samples": self.samples, "budget": self.budget.state_dict()}
        set_schedules(self.engine, self.budget, self.config.train.progress(self.step))
        if self.engine.module.thresholds is not None:
            state["thresholds"] = self.engine.module.thresholds
        state["spikes"], state["metrics"] = self.checks.state_dict(), self.metrics.state_dict()
        ranges = [list(r) for r in self.config.data.skip_ranges]
        state["data"] = {"fingerprint": self.fingerprint, "skip_ranges": ranges}
        if self.balance.layers:
            state["balance"] = self.balance.state_dict()
        with self.metrics.paused():
            try:
                self.saver.wait()
                if self._is_saved():
                    return
            except ValueError as error:
                self.log.warning(f"{error}; trying once more, with step {self.step:,}")
                wait = True
            self.saver.save(self.engine, self.step, state)
            self._saved_step = self.step
            if wait or not self.config.train.checkpoint.background:
                self.saver.wait()

    def _is_saved(self) -> bool:
        """Whether a start would resume from this step: it is the last one saved, or the first; collective."""
        if self._saved_step != self.step:
            return False
        # Else the run folder may be gone. Step 0 needs no checkpoint: every fresh start begins there.
        there = self.step == 0 or checkpoint_at(self.run.checkpoints, self.step).is_dir()
        return bool(self.world.broadcast_object(there))

    def _finish_saving(self) -> None:
        """Finish the save under way before an error that all ranks raise: what is being written is still good."""
        try:
            self.saver.wait()
        except ValueError as error:
            self.log.warning(str(error))

    def stop_here(self) -> None:
        """End the run with this step saved, because some rank was asked to, and log how to resume; collective."""
        self.save(wait=True)
        self._is_stopped = True
        saved = f": step {self.step:,} is saved" if self.step else " before the first step"
        self.log.info(f"asked to stop{saved}; go on with: {command_again('train.checkpoint.resume=auto')}")

    def validate(self) -> bool:
        """Evaluate every validation set and log it; False if asked to stop before all was done.

        Then what is logged is whole, but the losses, by which a resume knows that the step was evaluated, are missing:
        the resume evaluates it again, all of it.
        """
        self.run.beat(self.step, "evaluating")
        # A resume after the save of this step does not evaluate again, so no generator may move in here.
        before = rng_state()
        set_schedules(self.engine, self.budget, self.config.train.progress(self.step))
        try:
            with self.metrics.paused():
                self.evaluate_all()
        except AskedToStop:
            return False
        finally:
            set_rng_state(before)
        return True

    def evaluate_all(self) -> None:
        """Run all that :meth:`validate` does, the losses last.

        Raises:
            AskedToStop: between two parts, on every rank.
        """
        self._run_tasks()
        sets = self.stop.between(self.validation_sets, self.world)
        results = evaluate(self.engine, sets, self.config, self.world, self.step)
        self.metrics.log_evaluation(self.step, results)
        self.evaluations = {step: found for step, found in self.evaluations.items() if step == 0}
        self.evaluations[self.step] = results

    def _run_tasks(self) -> None:
        """Run downstream tasks if due."""
        evaluation = self.config.train.evaluation
        if self.tasks is None or not evaluation.has_tasks(self.step, self.config.train.last_step):
            return
        outcome = self.tasks.run(self.engine, lambda _: self.stop.raise_if_agreed(self.world))
        self.metrics.log_scalars(self.step, outcome.scalars)
        self.log.info(f"step {self.step:>6,}  tasks: {outcome.sentence()}")

    def _take_back(self, state: dict[str, Any]) -> None:
        """Restore the trainer's part of a checkpoint's state."""
        self.step, self.samples = state["step"], state["samples"]
        self.budget.load_state_dict(state["budget"])
        self.engine.module.thresholds = state.get("thresholds")
        if self.balance.layers:
            self.balance.load_state_dict(state["balance"])
        self.checks.load_state_dict(state["spikes"])
        data = state["data"]
        if data["fingerprint"] == self.fingerprint:
            refuse_other_past(data["skip_ranges"], self.config.data.skip_ranges, self.samples)
