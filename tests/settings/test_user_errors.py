"""A user's mistake is one sentence and status 1; anything else keeps its traceback."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from settings import looks_first, user_errors
from settings.user_errors import EXIT_FAULT


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher, whatever the tests themselves were started with."""
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, PermissionError])
def test_one_sentence_and_status_one(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, user_errors():
        raise kind("train.steps must be positive, got 0")
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: train.steps must be positive, got 0\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), 78),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data"), 78),
        (FileNotFoundError("there is no /data; mount it"), 78),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 78),
        (OSError(errno.ENOSPC, "No space left on device"), 78),
        (OSError(errno.EIO, "Input/output error", "/data"), 1),
        (OSError(errno.ESTALE, "Stale file handle", "/data"), 1),
        (OSError(errno.EMFILE, "Too many open files", "/data"), 1),
        (OSError(errno.ENFILE, "Too many open files in system", "/data"), 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "/data"), 1),
        (OSError(errno.EHOSTDOWN, "Host is down", "/data"), 1),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out", "/data"), 1),
    ],
)
def test_a_mistakes_own_status_is_not_that_of_a_machine_that_fails(error: Exception, status: int) -> None:
    with pytest.raises(SystemExit) as caught, user_errors(78):
        raise error
    assert caught.value.code == status


def _of_a_library() -> None:
    int("x")  # Python's own ValueError


def _of_our_arithmetic() -> None:
    "é".encode("ascii")


def _of_json() -> None:
    json.loads("{")


@pytest.mark.parametrize("fault", [_of_a_library, _of_our_arithmetic, _of_json])
def test_the_same_classes_raised_by_others_are_faults(fault: Callable[[], None]) -> None:
    with pytest.raises(ValueError), user_errors():
        fault()


def test_too_many_open_files_are_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(SystemExit) as caught, user_errors(78):
            os.open("/dev/null", os.O_RDONLY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 24] Too many open files: '/dev/null'\n"


def test_a_file_that_cannot_be_opened_and_a_full_disk_are_no_faults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), user_errors():
        open("/nowhere/at/all")  # noqa: SIM115
    with pytest.raises(SystemExit), user_errors():
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert capsys.readouterr().err == (
        "error: [Errno 2] No such file or directory: '/nowhere/at/all'\nerror: [Errno 28] No space left on device\n"
    )


def test_a_fault_keeps_its_traceback_and_says_where_to_report_it() -> None:
    program = "from settings import user_errors\nwith user_errors():\n    int('x')"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_FAULT == 70
    assert "Traceback" in done.stderr and "invalid literal for int()" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("this is a bug in Hopscotch or a library that it uses")


def test_a_fault_among_ranks_is_shown_and_logged(tmp_path: Path) -> None:
    """torch.distributed puts a hook of its own around ours, which shows nothing where ours ends the process."""
    program = f"""
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from settings import user_errors
from trainer.log import open_log
with user_errors():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    open_log(Path({str(tmp_path / "rank-0.log")!r}), to_terminal=True)
    int("x")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_FAULT
    assert done.stderr.count("invalid literal for int()") == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("this is a bug in Hopscotch or a library that it uses")
    assert "invalid literal for int()" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.parametrize("kind", [AssertionError, KeyError, RuntimeError])
def test_our_own_mistakes_pass_through(kind: type[BaseException]) -> None:
    with pytest.raises(kind), user_errors():
        raise kind("bug")


def test_ctrl_c_is_one_word_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, user_errors():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_no_error_no_exit(capsys: pytest.CaptureFixture[str]) -> None:
    with user_errors():
        print("done")
    assert capsys.readouterr().out == "done\n"


def test_other_ranks_wait_and_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends them while they wait, so that a mistake common to all ranks is reported once."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as caught, user_errors():
            raise ValueError("no data")
        assert caught.value.code == 1
    assert capsys.readouterr().err == "error: no data\nrank 3: error: no data\n"
    assert len(waited) == 1 and waited[0] > 1


def test_a_closed_pipe_ends_quietly() -> None:
    """As in ``| head -1``, whether what is left is noticed while printing or when all is flushed."""
    for count in (3, 300_000):
        program = f"from settings import user_errors\nwith user_errors():\n    for n in range({count}): print(n)"
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} | true; echo ${{PIPESTATUS[0]}}"
        root = Path(__file__).parents[2]
        done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"caf\\xe9 \\u2588"), ("utf-8", "caf\u00e9 \u2588".encode())]
)
def test_what_the_output_cannot_show_is_escaped(encoding: str, shown: bytes) -> None:
    code = "from settings import user_errors\nwith user_errors(): print('caf\\u00e9 \\u2588')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, shown, b"")


def test_as_a_command(tmp_path: Path) -> None:
    """What a shell sees: status 1, no traceback."""
    program = "from settings import Strict, load, user_errors\nwith user_errors():\n    load('no.yaml', [], Strict)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: config file no.yaml does not exist\n"


@pytest.mark.parametrize(
    ("variables", "looks"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, True),  # nobody would end it if rank 0 alone did
    ],
)
def test_who_looks_before_the_ranks_meet(
    variables: dict[str, str], looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert looks_first() is looks
