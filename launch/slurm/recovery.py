"""What a job does once its ranks have failed: restart them on working nodes, requeue itself, or end.

    python -m launch.slurm.recovery STATUS --messages FILE --run RUN --failed FILE --nodes A,B --job-nodes A,B,C ...

``stage.sbatch`` calls it after every ``srun`` that failed. It prints one line, ``restart NODES``, ``requeue NODES``
(those to exclude, or none) or ``end``, and the reason on stderr. Which node failed first is found in ``srun``'s
messages, or else in the ranks' heartbeats. Each failure is a line of ``--failed``; a node that has two is not used
again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.config import SIGNAL_EARLY_S, seconds
from settings import command_parser, counted
from trainer.exit_status import EXIT_MISTAKE, EXIT_PREEMPTED, EXIT_STALLED
from trainer.heartbeat import Beat, behind, read_beats

MOST_FAILURES = 2
"""A node that failed first this many times in one allocation is broken, whatever SLURM reports about it."""
_LOST = re.compile(r"Node failure on (\S+)|Task launch for \S+ failed on node (\S+?):")
_ENDED = re.compile(r"^srun: error: (?P<nodes>\S+): tasks? (?P<tasks>\S+): (?P<how>.+)$", re.MULTILINE)
_STATUS = re.compile(r"Exited with exit code (\d+)")
_WELL = ("idle", "allocated", "mixed", "completing", "reserved", "planned")


@dataclass(frozen=True)
class Job:
    """Where a job's ranks ran, and where they may run.

    Attributes:
        nodes: of the job, in SLURM's order, spare ones included.
        used: those whose ranks have just ended, in the same order.
        ranks_per_node: on each of them.
        failed: which node failed first, for every failure in this allocation, oldest first.
    """

    nodes: tuple[str, ...]
    used: tuple[str, ...]
    ranks_per_node: int
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Next:
    """What to do next.

    Attributes:
        what: ``restart``, ``requeue`` or ``end``.
        why: for the job's log.
        nodes: those to start ranks on, or those that a requeued job must avoid.
    """

    what: str
    why: str
    nodes: tuple[str, ...] = ()


def first_failed(messages: str, beats: Sequence[Beat], job: Job) -> tuple[str, str] | None:
    """The node that failed first and how; None if no single one can be identified.

    Ranks that lost another one end after it, with a distinct status. ``srun`` names several nodes in one message if
    their ranks ended alike at the same moment, as from a bug in the program. If all ranks hung and reported it, those
    that the others waited for are at an earlier point of the step.

    Args:
        messages: what ``srun`` and the ranks have written to stderr.
        beats: the ranks' last heartbeats.
        job: where they ran.
    """
    if lost := _LOST.search(messages):
        return next(filter(None, lost.groups())), "SLURM lost it"
    for ended in _ENDED.finditer(messages):
        status = _STATUS.match(ended["how"])
        if status is None or int(status[1]) not in (EXIT_PREEMPTED, EXIT_STALLED):
            node = ended["nodes"]
            return (node, f"task {ended['tasks']}: {ended['how']}") if node in job.used else None
    late = set()
    if all(beat.phase == "stalled" for beat in beats):
        late = {beat.rank // job.ranks_per_node for beat in behind(list(beats))}
    return (job.used[late.pop()], "the others waited for it") if len(late) == 1 else None


def is_mistake(status: int, messages: str) -> bool:
    """Whether a rank reported that a user's mistake ended it; another may have ended with a larger status since."""
    ends = (_STATUS.match(ended["how"]) for ended in _ENDED.finditer(messages))
    return status == EXIT_MISTAKE or any(end is not None and int(end[1]) == EXIT_MISTAKE for end in ends)


def working(states: str) -> set[str]:
    """The nodes that SLURM can start something on.

    Args:
        states: lines of a node's name and its state, as of ``sinfo --Node --format="%N %T"``. ``*`` means that it does
            not respond; a job's own nodes are allocated, or draining if an administrator wants them after the job.
    """
    named = (line.split() for line in states.splitlines() if line.strip())
    return {name for name, state in named if state.startswith(_WELL) and not state.endswith("*")}


def choose(job: Job, well: set[str]) -> tuple[str, ...] | None:
    """As many working nodes as were used: first those that failed least often, then longest ago.

    None if there are too few.
    """

    def failures(node: str) -> tuple[int, int]:
        times = [number for number, name in enumerate(job.failed) if name == node]
        return len(times), times[-1] if times else -1

    usable = [node for node in job.nodes if node in well and failures(node)[0] < MOST_FAILURES]
    if len(usable) < len(job.used):
        return None
    chosen = sorted(usable, key=failures)[: len(job.used)]
    return tuple(node for node in job.nodes if node in chosen)


def decide(status: int, messages: str, job: Job, states: str, left_s: int | None, save_before_s: int) -> Next:
    """What to do after ranks ended with ``status``.

    Args:
        status: of ``srun``, the largest of any rank's.
        messages: as of :func:`first_failed`.
        job: including the latest failure.
        states: as of :func:`working`, of the whole partition.
        left_s: seconds until the job's time limit; None without one.
        save_before_s: how long before it the ranks are asked to save.
    """
    if is_mistake(status, messages):
        return Next("end", "a mistake that would end every start; correct it as the message above says")
    if status == EXIT_PREEMPTED:
        return Next("requeue", "saved")
    if left_s is not None and left_s <= save_before_s + SIGNAL_EARLY_S:
        return Next("requeue", f"the time limit is {left_s} s away, too close for another start here")
    well = working(states) if states else set(job.nodes)
    chosen = choose(job, well)
    if chosen is not None:
        return Next("restart", f"ranks start again on {', '.join(chosen)}", chosen)
    broken = tuple(node for node in job.nodes if job.failed.count(node) >= MOST_FAILURES)
    lost = [node for node in job.nodes if node not in well and node not in broken]
    why = f"{', '.join([*broken, *lost])} cannot be used, which leaves fewer than {counted(len(job.used), 'node')} here"
    if broken and len(well - set(broken)) < len(job.nodes):
        return Next("requeue", f"{why}; the partition has too few others, so SLURM may give the same ones again")
    return Next("requeue", why, broken)


def main() -> int:
    """Find and record which node failed, and print what to do next."""
    given = _parser().parse_args()
    messages = given.messages.read_text(errors="replace") if given.messages.exists() else ""
    noted = given.failed.read_text().split() if given.failed.exists() else []
    job = Job(given.job_nodes, given.nodes, given.ranks_per_node, tuple(noted))
    said = ""
    if given.status != EXIT_PREEMPTED and not is_mistake(given.status, messages):
        found = first_failed(messages, read_beats(given.run / "heartbeat"), job)
        if found is not None:
            node, how = found
            said = f"{node} failed first ({how}); "
            job = Job(job.nodes, job.used, job.ranks_per_node, (*job.failed, node))
            with given.failed.open("a") as file:
                file.write(f"{node}\n")
    states = _ask("sinfo", "--noheader", "--Node", f"--partition={os.environ['SLURM_JOB_PARTITION']}", "--format=%N %T")
    asked = ("squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%L %x")
    left, _, excluded = _ask(*asked).strip().partition(" ")
    follows = decide(given.status, messages, job, states, seconds(left), given.save_before_s)
    kept = [excluded] if follows.what == "requeue" and follows.nodes and excluded not in ("", "(null)") else []
    print(f"== status {given.status}; {said}{follows.why}", file=sys.stderr)
    print(follows.what, ",".join([*kept, *follows.nodes]))
    return 0


def _ask(*command: str) -> str:
    """Output of a SLURM command; empty if it does not respond."""
    with contextlib.suppress(subprocess.TimeoutExpired, OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    return ""


def _parser() -> argparse.ArgumentParser:
    def names(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    parser = command_parser("launch.slurm.recovery", __doc__)
    parser.add_argument("status", type=int, help="of srun")
    parser.add_argument("--messages", type=Path, required=True, metavar="FILE", help="what srun wrote to stderr")
    parser.add_argument("--run", type=Path, required=True, help="the run folder, for the heartbeats")
    parser.add_argument("--failed", type=Path, required=True, metavar="FILE", help="nodes that failed first so far")
    parser.add_argument("--nodes", type=names, required=True, metavar="A,B", help="that the ranks ran on")
    parser.add_argument("--job-nodes", type=names, required=True, metavar="A,B,C", help="of the job, spare ones too")
    parser.add_argument("--ranks-per-node", type=int, required=True, metavar="N", help="ranks on each node")
    parser.add_argument("--save-before-s", type=int, required=True, metavar="N", help="seconds before the time limit")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
