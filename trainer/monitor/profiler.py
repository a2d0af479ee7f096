"""Where time and memory go: a trace of a few steps from every rank, with our phases and the model's sites as ranges.

    RUN/profile/rank-N.pt.trace.json.gz     for Perfetto, TensorBoard and ``python -m launch.profile RUN``
    RUN/profile/rank-N.memory.pickle        with ``train.profile.memory``, from a GPU's allocator

When off it costs nothing: ranges are put around methods and modules before the first step to profile, and removed after
the last. A phase begins where the heartbeat's does; within a step, ``forward``, ``backward`` and ``optimiser`` are the
engine's calls, ``tracker`` is the logging of metrics. Sites are named after layers, as in the metrics.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.block import Block
from model.decoder import Decoder
from model.router import Router
from trainer.config_blocks import ProfileConfig
from trainer.heartbeat import Heartbeat
from trainer.log import logger_of_run
from trainer.monitor.phase_names import FOLDER, PHASES, TRACE

SNAPSHOT = ".memory.pickle"
_MOST_EVENTS = 200_000
"""Most allocations that a memory snapshot records with their stacks."""
_Undo = Callable[[], None]


class StepProfiler:
    """Profiles the steps that the config names, as far as this start of the run takes them.

    Args:
        config: which steps.
        folder: the run's.
        rank: this process's.
        device: where it computes.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, device: torch.device):
        self.first, self.last = config.steps
        self.wants_memory = config.memory
        self._place = folder / FOLDER / f"rank-{rank}"
        self._device, self._log = device, logger_of_run()
        self._profile: Any = None
        self._undo: list[_Undo] = []
        self._open: Any = None
        if self.wants_memory and device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        elif self.wants_memory and rank == 0:
            self._log.warning(
                "train.profile.memory: a snapshot shows a GPU's allocator, but this run is on a CPU; bytes by phase "
                "and site are in the trace, for launch.profile"
            )

    def between_steps(self, done: int, engine: Any, heartbeat: Heartbeat, tracking: Any) -> None:
        """Called before the data of step ``done + 1`` are loaded: begin, mark a step boundary, or end and write.

        Args:
            done: optimiser steps done.
            engine: around a decoder.
            heartbeat: its phases become ranges.
            tracking: the object whose ``log_step`` logs metrics.
        """
        if self._profile is not None and done < self.last:
            self._profile.step()
        elif self._profile is not None:
            self.close()
        elif self.first <= done + 1 <= self.last:
            self._begin(engine, heartbeat, tracking)

    def close(self) -> None:
        """End, if it has begun, and write the trace; a full disk loses the trace, not the run."""
        if self._profile is None:
            return
        profiled, self._profile = self._profile, None
        self._end_range()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        profiled.stop()
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(f"{self._place}{TRACE}")
            if self.wants_memory and self._device.type == "cuda":
                write_snapshot(self._place.parent, int(self._place.name.removeprefix("rank-")))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            self._log.warning(f"the profile {self._place}{TRACE} cannot be written ({error}); the run goes on")
            return
        self._log.info(
            f"profile of steps {self.first:,} to {self.last:,} written to {self._place}{TRACE}; for a summary: "
            f"python -m launch.profile {self._place.parent.parent}"
        )

    def _begin(self, engine: Any, heartbeat: Heartbeat, tracking: Any) -> None:
        from torch.profiler import ProfilerActivity, profile

        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the library prints a line at every start and stop
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.start()
        self._follow(heartbeat)
        self._range_around(engine, "backward", "backward")
        self._range_around(engine, "step", "optimiser")
        self._range_around(tracking, "log_step", "tracker")
        self._range_over(engine, "forward")
        self._sites(engine.module)

    def _follow(self, heartbeat: Heartbeat) -> None:
        """A range for every phase that the heartbeat notes, from one note to the next."""
        note = heartbeat.note

        main = threading.get_ident()

        def noted(step: int, phase: str) -> None:
            if threading.get_ident() != main:  # the watchdog, as it ends the process
                note(step, phase)
                return
            self._end_range()
            note(step, phase)
            self._begin_range(PHASES.get(phase, phase))

        heartbeat.note = noted  # type: ignore[method-assign]
        self._undo.append(lambda: delattr(heartbeat, "note"))
        self._begin_range(PHASES["loading"])

    def _begin_range(self, name: str) -> None:
        self._open = torch.profiler.record_function(name)
        self._open.__enter__()

    def _end_range(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def _range_around(self, owner: Any, method: str, name: str) -> None:
        """A range around every call of ``owner.method``."""
        call = getattr(owner, method)

        def ranged(*arguments: Any, **named: Any) -> Any:
            with torch.profiler.record_function(name):
                return call(*arguments, **named)

        own = vars(owner).get(method)
        setattr(owner, method, ranged)
        self._undo.append(lambda: delattr(owner, method) if own is None else setattr(owner, method, own))

    def _range_over(self, module: nn.Module, name: str) -> None:
        """A range over every forward pass of ``module``, ZeRO's gathering before it included."""
        entered: list[Any] = []

        def enter(*_: Any) -> None:
            entered.append(torch.profiler.record_function(name))
            entered[-1].__enter__()

        def leave(*_: Any) -> None:
            entered.pop().__exit__(None, None, None)

        hooks = (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        )
        self._undo += [hook.remove for hook in hooks]

    def _sites(self, decoder: Decoder) -> None:
        self._range_over(decoder.embed_tokens, "embedding")
        for layer in decoder.layers:
            assert isinstance(layer, Block)
            name = f"layer-{layer.layer:02d}"
            if layer._compiled_call_impl is not None:  # one graph; hooks see nothing inside it
                self._range_around(layer, "_compiled_call_impl", name)
                continue
            self._range_over(layer, name)
            self._range_over(layer.self_attn, f"{name} attention")
            self._range_around(layer.self_attn, "keys_values", f"{name} attention")
            self._range_over(layer.mlp, f"{name} ffn")
            for module in layer.children():
                if isinstance(module, Router):
                    self._range_over(module, f"{name} router")
        if decoder.ensemble is not None:
            self._range_over(decoder.ensemble, "ensemble")
        self._range_over(decoder.norm, "norm")
        self._range_over(decoder.lm_head, "head and loss")


def write_snapshot(folder: Path, rank: int) -> Path:
    """Write what the GPU's allocator holds, with its history if that was recorded; for pytorch.org/memory_viz."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank}{SNAPSHOT}"
    torch.cuda.memory._dump_snapshot(str(path))
    return path
