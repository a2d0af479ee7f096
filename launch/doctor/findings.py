"""The findings of ``launch.doctor``: running the small functions that return them, and merging those of many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from settings import one_line

Level = Literal["ok", "warning", "error"]
_ORDER: tuple[Level, ...] = ("ok", "warning", "error")
_HOSTS_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        level: ``error`` where a run would fail or hang, ``warning`` where it would be slow or fragile.
        found: one line.
        remedy: what to do about it; empty if nothing.
    """

    check: str
    level: Level
    found: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def run(checks: dict[str, Check]) -> list[Finding]:
    """Run all checks; returns the findings in order. A check that itself fails is a finding too; the others still run.

    ``ValueError`` and ``OSError`` are what our own code raises for a user's mistake, as "what is wrong; what to do".
    """
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings += check()
        except (ValueError, OSError) as error:
            found, _, remedy = " ".join(str(error).split()).partition("; ")
            findings.append(Finding(name, "error", found, remedy))
        except Exception as error:
            what = f"the check itself failed ({type(error).__name__}: {one_line(error, 200)})"
            findings.append(Finding(name, "warning", what, "check it by hand"))
    return findings


def merge(by_host: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """Merge the findings of several ranks, each with its host's name, into one list.

    For a check that is fine everywhere, the first rank's finding is kept; problems are reported once, with their hosts.
    """
    several = len({host for host, _ in by_host}) > 1
    merged: list[Finding] = []
    for name in dict.fromkeys(finding.check for _, findings in by_host for finding in findings):
        every = [(host, finding) for host, findings in by_host for finding in findings if finding.check == name]
        bad: dict[Finding, list[str]] = {}
        for host, finding in every:
            if finding.level != "ok":
                bad.setdefault(finding, []).append(host)
        merged += [_on(finding, where) if several else finding for finding, where in bad.items()]
        if not bad:
            merged += [finding for host, finding in every if host == every[0][0]]
    return merged


def worst(findings: Iterable[Finding]) -> Level:
    """The most severe level."""
    return max((finding.level for finding in findings), key=_ORDER.index, default="ok")


def _on(finding: Finding, hosts: Iterable[str]) -> Finding:
    names = sorted(set(hosts))
    more = f" and {len(names) - _HOSTS_NAMED} more" if len(names) > _HOSTS_NAMED else ""
    return replace(finding, found=f"{', '.join(names[:_HOSTS_NAMED])}{more}: {finding.found}")
