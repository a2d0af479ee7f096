"""The command: what it refuses before the model is read, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.play.__main__ import main
from tests.evals.tiny import run_folder, weights_folder
from tests.ranks import Processes


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]) -> str:
    return str(weights_folder(tmp_path_factory.mktemp("play") / "weights", "layer", corpus, max_positions=4096))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_what_cannot_be_served_is_told(capsys: pytest.CaptureFixture[str], weights: str, tmp_path: Path) -> None:
    assert "--port must be at least 0 and at most 65535, got 70000" in refused(capsys, weights, "--port", "70000")
    assert "--waiting must be at least 0, got -1" in refused(capsys, weights, "--waiting", "-1")
    assert "--max-new-tokens must be at least 1, got 0" in refused(capsys, weights, "--max-new-tokens", "0")
    assert f"there is no folder {tmp_path / 'none'}" in refused(capsys, str(tmp_path / "none"))
    away = refused(capsys, weights, "--host", "192.0.2.1")
    assert "cannot listen on 192.0.2.1, port 8000" in away and "an address of this machine with --host" in away
    assert "--device must be" in refused(capsys, weights, "--device", "tpu")
    dial = refused(capsys, weights, "--port", "0", "--dial", str(tmp_path / "dial.json"))
    assert f"there is no dial {tmp_path / 'dial.json'}; calibrate one" in dial


def test_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str], weights: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert refused(capsys, weights, "--port", port) == (
            f"error: port {port} of 127.0.0.1 is taken by another program; give another with --port, or 0 for a free "
            "one\n"
        )


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, weights: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"error: {package} is not installed; install it with: " in refused(capsys, weights)


def _served(server: Processes) -> str:
    server.wait_until(lambda: "(Ctrl-C ends it)" in server.output)
    return re.search(r"http://([^/]+)/", server.output)[1]  # type: ignore[index]


def test_ctrl_c_ends_it_and_what_is_being_answered(weights: str) -> None:
    with Processes("evals.play", weights, "--port", "0", "--max-new-tokens", "4000") as server:
        connection = http.client.HTTPConnection(_served(server), timeout=30)
        body = json.dumps({"max_tokens": 4000, "stream": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data: {")
        os.kill(int(server.processes[0].pid or 0), signal.SIGINT)
        rest = answer.read()
        assert server.end() == [0]
        assert b'"message":"the server was stopped"' in rest and b"[DONE]" not in rest
        assert server.output.endswith("stopped\n") and "Traceback" not in server.output, server.output


def test_other_machines_get_in_only_if_asked(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """A run without a dial, in bf16: the page says how to get one, the command that nobody needs a password."""
    run = run_folder(tmp_path / "mine", tiny)
    with Processes("evals.play", str(run), "--port", "0", "--host", "0.0.0.0", "--dtype", "bf16") as server:
        address = _served(server).replace("0.0.0.0", "127.0.0.1")
        assert "warning: 0.0.0.0 lets other machines in without a password" in server.output
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.request("GET", "/v1/models", headers={"host": "my-server:8000"})
        (model,) = json.loads(connection.getresponse().read())["data"]
        assert model["id"] == "mine" and model["details"]["step"] == 7
        assert model["details"]["no_dial"].startswith(f"there is no dial {run / 'dial/dial.json'}; calibrate one")
        body = json.dumps({"prompt": "def", "max_tokens": 2, "details": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        tokens = json.loads(connection.getresponse().read())["choices"][0]["details"]["tokens"]
        assert all(0 <= token["layers"] <= 4 for token in tokens) and tokens
