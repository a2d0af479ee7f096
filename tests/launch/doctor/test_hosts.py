"""What the doctor says of a hostfile and of the hosts in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.doctor import hosts
from launch.doctor.findings import run
from tests.launch.doctor.helpers import only, program


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one slots=8\ntwo 8\n", "line 2: 'two 8' is not 'host slots=N'"),
        ("one slots=0\n", "line 1: 'one slots=0' is not"),
        ("one slots=8\n\none slots=8\n", "line 3: one is listed twice"),
        ("# nobody\n", "names no host"),
        (None, "does not exist"),
    ],
)
def test_a_hostfile_is_read_strictly(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_text(text)
    finding = only(run({"hostfile": lambda: hosts.hostfile(path)}))
    assert finding.level == "error" and words in finding.found and finding.remedy


def test_hosts_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hostfile"
    path.write_text("127.0.0.1 slots=2\nno-such-host.invalid slots=4\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hosts.unreachable("127.0.0.1") == "there is no ssh command here"
    program(tmp_path, "ssh", "echo 'Permission denied (publickey).' >&2; exit 255")
    told, differ, *problems = hosts.hostfile(path)
    assert told.found.endswith("2 hosts, 6 slots") and differ.level == "warning"
    assert [p.level for p in problems] == ["error", "error"]
    assert problems[0].found.startswith("127.0.0.1: ssh: Permission denied (publickey).")
    program(tmp_path, "ssh", "exit 0")
    path.write_text("127.0.0.1 slots=2\n")
    assert [f.level for f in hosts.hostfile(path)] == ["ok", "ok"]
    monkeypatch.setattr(hosts, "TIMEOUT_S", 0.2)
    program(tmp_path, "ssh", "exec /bin/sleep 5")
    assert "did not end within" in str(hosts.unreachable("127.0.0.1"))
