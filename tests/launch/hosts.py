"""Several hosts on one machine: an SSH daemon of its own for each loopback address, reached by pdsh as any other."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.launching import free_port
from tests.programs import where


class Hosts:
    """Running SSH daemons.

    Attributes:
        addresses: one a host.
        hostfile: for ``deepspeed --hostfile``, one slot a host.
        environment: what lets pdsh in.
    """

    def __init__(self, folder: Path, addresses: Sequence[str]):
        self.addresses, self._daemons = addresses, []
        port = free_port()
        for name in ("user", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where a daemon started by root wants to live
        for address in addresses:
            options = {
                "ListenAddress": address,
                "Port": port,
                "HostKey": folder / "host",
                "AuthorizedKeysFile": folder / "user.pub",
                "StrictModes": "no",
                "UsePAM": "no",
                "PidFile": "none",
            }
            given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
            self._daemons.append(
                subprocess.Popen([str(where("sshd")), "-D", "-e", "-f", "/dev/null", *given], stderr=subprocess.PIPE)
            )
        (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for address in addresses))
        self.hostfile = str(folder / "hostfile")
        client = f"-F /dev/null -p {port} -i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        self.environment = {"PDSH_SSH_ARGS_APPEND": f"{client} -o LogLevel=ERROR"}

    def processes(self, number: int) -> list[psutil.Process]:
        """All that runs on a host, its daemon first."""
        try:
            daemon = psutil.Process(self._daemons[number].pid)
            return [daemon, *daemon.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, number: int) -> None:
        """The host dies."""
        for process in self.processes(number):
            process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End all daemons and what they started."""
        for number, daemon in enumerate(self._daemons):
            self.kill(number)
            daemon.wait()


@contextmanager
def hosts(folder: Path, addresses: Sequence[str] = ("127.0.0.2", "127.0.0.3")) -> Iterator[Hosts]:
    """Hosts at these loopback addresses, their keys below ``folder``."""
    made = Hosts(folder, addresses)
    try:
        yield made
    finally:
        made.close()
