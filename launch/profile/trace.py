"""Read a trace of ``trainer/monitor/profiler.py``: what every operator cost, by phase, part of the step and site.

Time is self time, without that of nested operators, so that all of it adds up to the time of the steps. A backward
operator belongs to the site of the forward operator with the same sequence number. A GPU kernel belongs to the operator
that launched it.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trainer.monitor.phase_names import PARTS, PHASES

_EVALUATE, _ACCUMULATE = "autograd::engine::evaluate_function: ", "AccumulateGrad"
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_RUNTIME = ("cuda_runtime", "cuda_driver")
_SYNCHRONIZE = ("Synchronize", "cudaMemcpy", "cuMemcpy")
GRADIENTS = "gradients"
"""Site of gradient accumulation and, with ZeRO, of sending gradients to the other ranks."""
ELSEWHERE = "elsewhere"


Key = TypeVar("Key")
Sum = defaultdict[Key, float]


class Place(NamedTuple):
    """Where something happened."""

    phase: str
    part: str
    site: str


@dataclass
class Sums:
    """Sums over one rank's trace; microseconds and bytes, over all profiled steps.

    Attributes:
        steps: how many whole steps.
        by_place: self time of operators, on the CPU.
        kernels: time of kernels by the place that launched them; empty without a GPU.
        by_operator: self time and calls of operators in steps.
        by_kernel: the same for kernels.
        allocated: bytes allocated, by place.
        held: of what was allocated in the trace, bytes alive at the peak, by place of the allocation.
        waiting: time in collectives, including the wait for other ranks, and in waits for the device. Collectives may
            overlap with operators.
        between: time in which no operator ran: Python.
        busy: time in which the GPU ran kernels.
        wall: of all phases together.
        in_steps: of the steps alone, without data, saving and evaluating.
    """

    steps: int = 0
    wall: float = 0.0
    in_steps: float = 0.0
    busy: float = 0.0
    between: float = 0.0
    by_place: Sum[Place] = field(default_factory=lambda: defaultdict(float))
    kernels: Sum[Place] = field(default_factory=lambda: defaultdict(float))
    by_operator: dict[str, tuple[float, int]] = field(default_factory=dict)
    by_kernel: dict[str, tuple[float, int]] = field(default_factory=dict)
    allocated: Sum[Place] = field(default_factory=lambda: defaultdict(float))
    held: Sum[Place] = field(default_factory=lambda: defaultdict(float))
    waiting: Sum[str] = field(default_factory=lambda: defaultdict(float))


class _Open(NamedTuple):
    end: float
    place: Place
    event: dict[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace.

    Raises:
        ValueError: if it is no trace.
    """
    try:
        with gzip.open(path) as file:
            return list(json.load(file)["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a trace ({error}); profile the steps again") from error


class Reader:
    """Sums up the events of one rank, in one pass over each thread, the main one first."""

    def __init__(self, events: Iterable[dict[str, Any]]):
        self.sums = Sums()
        self._threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self._memory: list[dict[str, Any]] = []
        self._kernels: list[dict[str, Any]] = []
        self._collectives: list[dict[str, Any]] = []
        main: Any = None
        for event in events:
            kind = event.get("cat")
            if kind in ("cpu_op", "user_annotation", *_RUNTIME):
                self._threads[event["tid"]].append(event)
                if kind == "user_annotation" and event["name"] in PHASES.values():
                    main = event["tid"]
            elif event.get("name") == "[memory]":
                self._memory.append(event)
            elif kind in _KERNELS:
                self._kernels.append(event)
            if _is_collective(event):
                self._collectives.append(event)
        if main is None:
            raise ValueError(
                "the trace has none of Hopscotch's phases; it is from another program, or has no complete step"
            )
        self._site_of: dict[int, str] = {}
        """By sequence number."""
        self._launched_at: dict[int, Place] = {}
        """By external id."""
        self._times: dict[Any, tuple[list[float], list[Place]]] = {}
        """By thread: times, and the place from each of them on."""
        self._walk(main, is_main=True)
        for thread in self._threads.keys() - {main}:
            if any(event["name"].startswith(_EVALUATE) for event in self._threads[thread]):
                self._walk(thread, is_main=False)
        self._sum_kernels()
        self._sum_memory(main)

    def _walk(self, thread: Any, is_main: bool) -> None:
        """Self time and place of everything on one thread."""
        events = sorted(self._threads[thread], key=lambda event: (event["ts"], -event["dur"]))
        outside = Place("", "", "") if is_main else Place(PHASES["training"], "backward", "")
        stack: list[_Open] = []
        own: dict[int, float] = {}
        starts, places = self._times.setdefault(thread, ([], []))

        def leave() -> None:
            opened = stack.pop()
            self._count(opened, own.pop(id(opened.event)), is_main)
            starts.append(opened.end)
            places.append(stack[-1].place if stack else outside)

        for event in events:
            while stack and stack[-1].end <= event["ts"]:
                leave()
            around = stack[-1].place if stack else outside
            place = self._place(event, around, is_main)
            if stack:
                own[id(stack[-1].event)] -= event["dur"]
            stack.append(_Open(event["ts"] + event["dur"], place, event))
            own[id(event)] = event["dur"]
            starts.append(event["ts"])
            places.append(place)
        while stack:
            leave()

    def _place(self, event: dict[str, Any], around: Place, is_main: bool) -> Place:
        name, arguments = event["name"], event.get("args", {})
        place = around
        if event["cat"] == "user_annotation":
            if name in PHASES.values() and is_main and not around.phase:
                place = Place(name, "", "")
                self.sums.wall += event["dur"]
                if name == PHASES["training"]:
                    self.sums.steps += 1
                    self.sums.in_steps += event["dur"]
            elif name in PARTS:
                place = around._replace(part=name)
            elif not name.startswith(("ProfilerStep", "gloo:", "nccl:")):
                place = around._replace(site=name)
        elif name.startswith(_EVALUATE):
            found = self._site_of.get(arguments.get("Sequence number", -1), "")
            place = around._replace(site=GRADIENTS if _ACCUMULATE in name else found or around.site)
        elif "Sequence number" in arguments and around.part == "forward":
            self._site_of[arguments["Sequence number"]] = around.site
        if "External id" in arguments:
            self._launched_at[arguments["External id"]] = place
        return place

    def _count(self, opened: _Open, own: float, is_main: bool) -> None:
        """Add an event's self time, microseconds."""
        event, place, sums = opened.event, opened.place, self.sums
        if not place.phase:
            return
        name = event["name"]
        sums.by_place[place] += own
        in_step = place.phase == PHASES["training"]
        if is_main and in_step and event["cat"] in _RUNTIME and any(word in name for word in _SYNCHRONIZE):
            sums.waiting["the device"] += event["dur"]
        if event["cat"] == "user_annotation":
            sums.between += own if is_main and in_step else 0.0
        elif in_step:
            time, calls = sums.by_operator.get(name, (0.0, 0))
            sums.by_operator[name] = (time + own, calls + 1)

    def _sum_kernels(self) -> None:
        own = []
        for kernel in self._kernels:
            place = self._launched_at.get(kernel.get("args", {}).get("External id"), Place("", "", ""))
            if not place.phase:
                continue
            own.append(kernel)
            self.sums.kernels[place] += kernel["dur"]
            time, calls = self.sums.by_kernel.get(kernel["name"], (0.0, 0))
            self.sums.by_kernel[kernel["name"]] = (time + kernel["dur"], calls + 1)
        self.sums.busy = _union(own)
        if self._collectives:
            self.sums.waiting["collectives"] = _union(self._collectives)

    def _sum_memory(self, main: Any) -> None:
        """Bytes allocated by place, and bytes held by place at the peak."""
        device = any(event["args"]["Device Type"] != 0 for event in self._memory)
        alive: dict[Any, tuple[int, Place]] = {}
        held: Sum[Place] = defaultdict(float)
        total = most = 0
        for event in sorted(self._memory, key=lambda event: event["ts"]):
            arguments = event["args"]
            if device and arguments["Device Type"] == 0:
                continue
            size, address = arguments["Bytes"], arguments["Addr"]
            if size > 0:
                place = self._place_at(event["tid"] if event["tid"] in self._times else main, event["ts"])
                alive[address] = (size, place)
                self.sums.allocated[place] += size
                held[place] += size
                total += size
                if total > most:
                    most, self.sums.held = total, held.copy()
            elif address in alive:
                size, place = alive.pop(address)
                held[place] -= size
                total -= size

    def _place_at(self, thread: Any, time: float) -> Place:
        starts, places = self._times[thread]
        index = bisect.bisect_right(starts, time) - 1
        return places[index] if index >= 0 else Place("", "", "")


def _is_collective(event: dict[str, Any]) -> bool:
    """Whether an event is a collective: of gloo, which runs in its own threads, or of NCCL, which runs as kernels."""
    if event.get("cat") in _KERNELS:
        return "nccl" in event["name"].lower()
    return event.get("cat") == "user_annotation" and event["name"].startswith("gloo:")


def _union(events: Iterable[dict[str, Any]]) -> float:
    """Time that is covered by at least one of ``events``."""
    covered = end = 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        finish = event["ts"] + event["dur"]
        covered += max(finish - max(event["ts"], end), 0.0)
        end = max(end, finish)
    return covered
