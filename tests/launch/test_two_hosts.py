"""The deepspeed launcher over two hosts of a hostfile, reached by pdsh: real SSH daemons on two loopback addresses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch import hosts as two
from tests.launching import BIN, ROOT, environment, free_port
from tests.programs import HOSTS, needs

pytestmark = needs(*HOSTS)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[two.Hosts]:
    """Two of them."""
    folder = tmp_path / "hosts"
    folder.mkdir()
    with two.hosts(folder) as made:
        yield made


def _start(hosts: two.Hosts, config: str, folder: Path) -> subprocess.Popen[str]:
    """As a person would type it; what goes to the other host beside PYTHON* variables is in the environment file."""
    (folder / "deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    command = [str(BIN / "deepspeed"), "--hostfile", hosts.hostfile, "--no_ssh_check", "--log_level", "error"]
    command += ["--master_addr", hosts.addresses[0], "--master_port", str(free_port())]
    return subprocess.Popen(
        [*command, "--module", "pretrain.train", config],
        cwd=ROOT,
        env=environment() | hosts.environment | {"DS_ENV_FILE": str(folder / "deepspeed_env")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextlib.contextmanager
def _endless(hosts: two.Hosts, tiny: dict[str, Any], write_config: Any, folder: Path) -> Iterator[Any]:
    """A run that has begun and saved once, and its ranks."""
    tiny["train"] |= {"steps": 100_000, "evaluation": {"every_steps": 50_000}}
    tiny["train"]["log"]["images"] = False
    run_dir = Path(tiny["train"]["run_dir"])
    process = _start(hosts, write_config(tiny), folder)
    try:
        while not (run_dir / "checkpoints/step-00000002/manifest.json").exists():
            assert process.poll() is None
            time.sleep(0.02)
        pids = [json.loads((run_dir / f"heartbeat/rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
        yield process, [psutil.Process(pid) for pid in pids]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _newest(tiny: dict[str, Any]) -> Path:
    """The newest whole checkpoint."""
    return max((Path(tiny["train"]["run_dir"]) / "checkpoints").glob("step-????????/manifest.json")).parent


def test_a_hostfile_starts_a_rank_on_each_host(hosts, tiny, write_config, tmp_path: Path) -> None:
    process = _start(hosts, write_config(tiny), tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    assert f"{hosts.addresses[0]}: run folder " in output and "Traceback" not in output
    assert json.loads((_newest(tiny) / "manifest.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_host_that_dies_is_said_and_the_rest_ends(hosts, tiny, write_config, tmp_path: Path, number: int) -> None:
    with _endless(hosts, tiny, write_config, tmp_path) as (process, ranks):
        hosts.kill(number)
        output, _ = process.communicate(timeout=120)
        psutil.wait_procs(ranks, timeout=30)
    assert process.returncode == 255, output[-3000:]  # ssh's own, the larger of it and our 76
    assert f"{hosts.addresses[number]}: Connection to {hosts.addresses[number]} closed by remote host" in output
    survivor = f"{hosts.addresses[1 - number]}: rank {1 - number}: error: another rank or its host is gone ("
    assert survivor in output and "Traceback" not in output
    assert not any(rank.is_running() for rank in ranks)
    assert int(_newest(tiny).name[5:]) >= 2


@pytest.mark.slow
def test_a_lost_connection_saves_and_stops(hosts, tiny, write_config, tmp_path: Path) -> None:
    with _endless(hosts, tiny, write_config, tmp_path) as (process, ranks):
        clients = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "ssh"]
        (client,) = (p for p in clients if hosts.addresses[1] in p.cmdline())
        client.kill()
        output, _ = process.communicate(timeout=120)
        psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() for rank in ranks)
    assert "asked to stop: step " in output and process.returncode == 75, output[-3000:]
    assert f"asked to stop: step {int(_newest(tiny).name[5:]):,} is saved" in output


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_on_all_hosts(hosts, tiny, write_config, tmp_path: Path) -> None:
    with _endless(hosts, tiny, write_config, tmp_path) as (process, ranks):
        process.terminate()
        assert process.wait(120) == 1  # DeepSpeed's own
        _, left = psutil.wait_procs(ranks, timeout=60)
    assert not left
    beats = [json.loads((Path(tiny["train"]["run_dir"]) / f"heartbeat/rank-{n}.json").read_text()) for n in (0, 1)]
    assert [beat["phase"] for beat in beats] == ["stopped", "stopped"]
    assert int(_newest(tiny).name[5:]) == beats[0]["step"]
