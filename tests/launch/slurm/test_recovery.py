"""What a job does once its ranks have failed: the decision by itself, and the whole script on commands that stand in.

What real SLURM makes of it is in test_cluster.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.__main__ import main
from launch.slurm.recovery import Job, choose, decide, first_failed, is_mistake, working
from tests.launching import ROOT
from trainer.heartbeat import Beat

JOB = Job(nodes=("n1", "n2", "n3", "n4"), used=("n1", "n2", "n3"), ranks_per_node=2, failed=())
WELL = "n1 allocated\nn2 allocated\nn3 mixed\nn4 allocated\n"
"""What ``sinfo`` says of a partition in which nothing is wrong."""


def _ended(node: str, how: str, tasks: str = "task 3") -> str:
    return f"srun: error: {node}: {tasks}: {how}\n"


LOST = _ended("n1", "Exited with exit code 76", "task 0") + _ended("n[1,3]", "Exited with exit code 76", "tasks 1,4-5")


@pytest.mark.parametrize(
    ("messages", "node"),
    [
        ("", None),
        ("Traceback (most recent call last):\n" + _ended("n2", "Exited with exit code 70"), "n2"),
        (_ended("n2", "Killed") + LOST, "n2"),
        (LOST + _ended("n2", "Aborted (core dumped)"), "n2"),  # srun may hear of the survivors first
        (_ended("n3", "Segmentation fault") + _ended("n2", "Aborted") + _ended("n1", "Aborted"), "n3"),
        (_ended("n[1-3]", "Exited with exit code 1", "tasks 0-5"), None),  # a fault that all have alike
        (_ended("n[1-3]", "Aborted", "tasks 0-5") + _ended("n2", "Killed"), None),
        (LOST, None),
        (LOST + _ended("n1", "Aborted") + "srun: error: Node failure on n3\n", "n3"),
        ("srun: error: Task launch for StepId=7.1 failed on node n2: Communication connection failure\n", "n2"),
    ],
)
def test_who_failed_first_is_found_in_what_srun_says(messages: str, node: str | None) -> None:
    found = first_failed(messages, [], JOB)
    assert (found and found[0]) == node


def _beats(phase: str, *places: tuple[int, str]) -> list[Beat]:
    """Heartbeats of ranks at these steps and phases, now all in ``phase``."""
    return [Beat(rank, "host", 1, 9, step, phase, before, 900.0, 0.0) for rank, (step, before) in enumerate(places)]


def test_where_all_hung_the_node_that_the_others_waited_for_failed() -> None:
    ahead, late = (8, "training"), (8, "loading")
    stalled = _beats("stalled", ahead, ahead, ahead, late, ahead, ahead)
    assert first_failed(LOST, stalled, JOB) == ("n2", "the others waited for it")
    assert first_failed(LOST, _beats("stalled", ahead, late, ahead, late, ahead, ahead), JOB) is None
    assert first_failed(LOST, _beats("stalled", *[ahead] * 6), JOB) is None
    assert first_failed(LOST, _beats("lost", ahead, ahead, ahead, late, ahead, ahead), JOB) is None


def test_nodes_that_do_not_answer_or_that_somebody_took_out_do_not_work() -> None:
    states = "a idle\nb down*\nc allocated*\nd draining\ne mixed\nf mixed-\ng fail\nh drained\ni completing\na idle\n"
    assert working(states) == {"a", "e", "f", "i"}


@pytest.mark.parametrize(
    ("failed", "down", "chosen"),
    [
        ((), "", "n1 n2 n3"),
        (("n2",), "", "n1 n3 n4"),
        (("n2", "n4"), "", "n1 n2 n3"),  # it failed longer ago
        (("n2", "n4", "n2"), "", "n1 n3 n4"),
        (("n2", "n4", "n2", "n4"), "", None),
        (("n4",), "n1", "n2 n3 n4"),
        (("n4",), "n1 n2", None),
    ],
)
def test_the_nodes_that_failed_least_and_longest_ago_are_used(
    failed: tuple[str, ...], down: str, chosen: str | None
) -> None:
    job = Job(JOB.nodes, JOB.used, JOB.ranks_per_node, failed)
    found = choose(job, set(JOB.nodes) - set(down.split()))
    assert (found and " ".join(found)) == chosen


@pytest.mark.parametrize("status", [1, 70, 76, 134, 135, 137, 139, 255])
def test_every_failure_is_restarted_but_a_mistake(status: int) -> None:
    assert decide(status, "", JOB, WELL, None, 300).what == "restart"
    assert decide(status, _ended("n1", "Exited with exit code 78"), JOB, WELL, None, 300).what == "end"
    assert is_mistake(78, "") and decide(78, "", JOB, WELL, None, 300).what == "end"
    assert decide(75, "", JOB, WELL, None, 300) == decide(75, "", JOB, "", 10, 300)
    assert decide(75, "", JOB, WELL, None, 300).what == "requeue"


def test_a_start_that_would_not_last_is_left_to_the_next_job() -> None:
    assert decide(134, "", JOB, WELL, 361, 300).what == "restart"
    near = decide(134, "", JOB, WELL, 360, 300)
    assert (near.what, near.nodes) == ("requeue", ()) and "the time limit is 360 s away" in near.why


def test_too_few_nodes_left_go_back_into_the_queue_without_the_broken_ones_where_there_are_others() -> None:
    job = Job(JOB.nodes, JOB.used, JOB.ranks_per_node, ("n2", "n2"))
    down = WELL.replace("n1 allocated", "n1 down*")
    alone = decide(134, "", job, down, None, 300)
    assert (alone.what, alone.nodes) == ("requeue", ()) and "too few others" in alone.why
    assert alone.why.startswith("n2, n1 cannot be used, which leaves fewer than 3 nodes here")
    others = decide(134, "", job, down + "n5 idle\nn6 idle\n", None, 300)
    assert (others.what, others.nodes) == ("requeue", ("n2",))
    assert decide(134, "", job, "", None, 300).what == "restart"  # SLURM does not answer: what is left is tried


STUBS = {
    "srun": """#!/bin/bash
case "$*" in *"bash -c"*) exec sleep 60;; esac
for word; do case "$word" in --nodelist=*) nodes=${word#*=};; esac; done
echo "ran on $nodes"
line=$(head -n 1 "$STUB/script"); sed -i 1d "$STUB/script"
read -r status saves message <<< "$line"
[ "$saves" = - ] || mkdir -p "$RUN/checkpoints/$saves"
[ -z "$message" ] || echo "srun: error: $message" >&2
[ "$message" != cancelled ] || { kill -TERM $PPID; sleep 0.2; }
exit "$status"
""",
    "scontrol": """#!/bin/bash
case "$1" in
    show) printf 'n%s\\n' $(seq "$NODES");;
    *) echo "scontrol $*" >> "$STUB/asked"; [ "$1" != "$REFUSED" ];;
esac
""",
    "sinfo": '#!/bin/bash\ncat "$STUB/states"\n',
    "squeue": '#!/bin/bash\necho "1-00:00:00 ${EXCLUDED:-(null)}"\n',
}


@pytest.fixture
def job(
    tiny: dict[str, Any],
    write_config: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    """Runs the script of a job of two nodes on stubs.

    Each start of the ranks takes a line: the status of srun, a checkpoint that the start saves or -, what srun says.
    Gives the job's status, its output, and what it asked ``scontrol`` for.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    stubs, run = tmp_path / "stubs", Path(tiny["train"]["run_dir"])
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def start(*starts: str, spare: int = 0, states: str = WELL, **variables: str) -> tuple[int, str, str]:
        arguments = ["--nodes", "2", "--spare-nodes", str(spare), "--tasks-per-node", "1", "--dry-run"]
        assert main([write_config(tiny), *arguments]) == 0
        script = capsys.readouterr().out
        (submission,) = {line.split("/submit/")[1] for line in script.splitlines() if line.startswith("submitted=")}
        (run / "submit" / submission).mkdir(parents=True, exist_ok=True)
        (run / "submit" / submission / "code").symlink_to(ROOT)
        (stubs / "script").write_text("".join(f"{line}\n" for line in starts))
        (stubs / "states").write_text(states)
        (stubs / "asked").write_text("")
        environment = os.environ | {
            "PATH": f"{stubs}:{os.environ['PATH']}", "STUB": str(stubs), "RUN": str(run), "NODES": str(2 + spare),
            "SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "main", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", script], env=environment | variables, capture_output=True, text=True, check=False, cwd=ROOT
        )
        left = (stubs / "script").read_text()
        assert not left, f"{left}{done.stdout}{done.stderr}"
        return done.returncode, done.stdout + done.stderr, (stubs / "asked").read_text()

    return start


REQUEUED = "scontrol requeue 7\n"


@pytest.mark.parametrize(
    ("status", "starts", "asked"),
    [
        (0, ["0 step-1"], ""),
        (0, ["1 - n2: task 1: Exited with exit code 1", "134 step-1 n1: task 0: Aborted", "0 step-2"], ""),
        (0, ["135 step-1", "137 step-2", "139 step-3", "255 step-4", "76 step-5", "70 step-6", "0 step-7"], ""),
        (75, ["76 -", "75 step-1"], REQUEUED),
        (78, ["78 -"], ""),
        (137, ["137 - n1: task 0: Exited with exit code 78"], ""),
        (1, ["134 -"] * 3, ""),
        (1, ["134 step-1", "134 -", "1 -", "139 -"], ""),
        (143, ["143 - cancelled"], ""),
    ],
)
def test_a_table_of_statuses(
    job: Callable[..., tuple[int, str, str]], status: int, starts: list[str], asked: str
) -> None:
    found = job(*starts)
    assert (found[0], found[2]) == (status, asked), found[1]
    gave_up = "error: 3 starts of job 7 came no further than" in found[1]
    assert gave_up == (status == 1), found[1]


def test_the_spare_node_takes_over_and_then_the_one_that_failed_longest_ago(
    job: Callable[..., tuple[int, str, str]],
) -> None:
    starts = ["134 step-1 n1: task 0: Aborted", "137 step-2 n3: task 1: Killed", "1 step-3 n2: task 1: Aborted", "0 -"]
    status, output, asked = job(*starts, spare=1)
    assert (status, asked) == (0, "")
    ran = [line for line in output.splitlines() if line.startswith("ran on")]
    assert ran == ["ran on n1,n2", "ran on n2,n3", "ran on n1,n2", "ran on n1,n3"]
    assert "== status 134; n1 failed first (task 0: Aborted); ranks start again on n2, n3\n" in output


def test_too_few_nodes_left_are_requeued_and_the_broken_one_is_excluded(
    job: Callable[..., tuple[int, str, str]],
) -> None:
    starts = ["134 step-1 n2: task 1: Aborted", "139 step-2 n2: task 1: Segmentation fault"]
    status, output, asked = job(*starts, EXCLUDED="n[7-9]")
    assert (status, asked) == (139, f"{REQUEUED}scontrol update JobId=7 ExcNodeList=n[7-9],n2\n")
    assert "== job 7 goes back into the queue" in output


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        ("update", "note: SLURM does not exclude n2 from job 7, and may give them to it again"),
        ("requeue", "error: job 7 is not requeued; go on with: sbatch "),
    ],
)
def test_what_slurm_refuses_is_said(job: Callable[..., tuple[int, str, str]], refused: str, sentence: str) -> None:
    starts = ["134 step-1 n2: task 1: Aborted", "134 step-2 n2: task 1: Aborted"]
    status, output, _ = job(*starts, REFUSED=refused)
    assert status == 134 and sentence in output


def test_where_python_cannot_look_the_job_is_requeued(job: Callable[..., tuple[int, str, str]]) -> None:
    status, _, asked = job("75 step-1", PYTHONHOME="/nowhere")
    assert (status, asked) == (75, REQUEUED)
