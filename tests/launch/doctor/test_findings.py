"""Findings of checks that break, and of several hosts in one list."""

from __future__ import annotations

from dataclasses import replace

from launch.doctor.findings import Finding, merge, run, worst


def test_a_broken_check_never_breaks_the_others() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("who knows")

    first, second = run({"broken": broken, "fine": lambda: [Finding("fine", "ok", "all well")]})
    assert first.level == "warning" and "RuntimeError: who knows" in first.found
    assert second.level == "ok"


def test_findings_of_several_hosts_become_one_list() -> None:
    fine, bad = Finding("disk", "ok", "room"), Finding("disk", "error", "full", "make room")
    clock = Finding("port", "ok", "free")
    assert merge([("one", [fine, clock]), ("two", [fine])]) == [fine, clock]
    merged = merge([("one", [fine]), *((f"n{i}", [bad]) for i in range(6))])
    assert merged == [replace(bad, found="n0, n1, n2, n3 and 2 more: full")]
    assert merge([("one", [bad]), ("one", [])]) == [bad]  # one host needs no name
    gpus = [Finding("gpus", "ok", f"{number}: H100") for number in range(3)]
    assert merge([("one", gpus[:1]), ("one", gpus[1:2]), ("two", gpus[2:])]) == gpus[:2]
    assert worst([fine, bad]) == "error" and worst([]) == "ok"
