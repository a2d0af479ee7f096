"""A real MLflow server on loopback, with SQLite, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.launching import environment, free_port

_PATIENCE_S = 120.0


class Server:
    """``mlflow server`` in ``folder``, which has its database: what is killed and started again goes on."""

    def __init__(self, folder: Path):
        self._folder, self._port = folder, free_port()
        self.start()

    def start(self) -> None:
        """Start it, on the same port every time, and wait until it answers."""
        folder, port = self._folder, self._port
        self.address = f"http://127.0.0.1:{port}"
        words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        words += ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "artifacts"]
        own = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                words, cwd=folder, env=environment() | own, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _PATIENCE_S
        while not self._answers():
            assert self._process.poll() is None, (folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """At once, with its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
