"""The pages that people read: nothing left to be filled in, no dead link, no line that runs off the screen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from settings.reference import reference
from trainer.config import PretrainConfig
from tune.config import TuneFile

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


COLUMNS = 120
HISTORY = ("LOG.md", "CHANGELOG.md")
"""Pages that name files as they were."""


def _anchors(page: Path) -> list[str]:
    """What GitHub makes of a page's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholders_and_no_dead_links(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"@@|\bTODO\b|\bXXX\b", text)
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
            assert not anchor or anchor in _anchors(page.parent / target if target else page), anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_too_long(page: Path) -> None:
    """``make check`` formats text; this is about blocks of code as well, which it leaves alone.

    Excepted are rows of tables, and what has no space to break at: links and commands in a line.
    """
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        words = re.sub(r"\[[^]]*\]\([^)]*\)|`[^`]*`", "unbroken", line.removeprefix("- ")).split()
        assert len(line) <= COLUMNS or line.startswith("|") or len(words) == 1, f"{page.name}:{number}: {line}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    """README's tree above all."""
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "runs"
    )
    named = re.findall(rf"(?<![\w./])((?:{folders})/[\w/]+\.(?:py|yaml|md|png|sbatch))\b", page.read_text())
    places = (ROOT, ROOT / "tests")  # docs/faults.md names tests from there
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_diary_has_an_index_of_all_its_entries() -> None:
    text = (ROOT / "LOG.md").read_text()
    entries = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert re.findall(r"^- \[(.*)\]\(#.*\)$", text, re.MULTILINE) == entries
    assert [entry[:10] for entry in entries] == sorted((entry[:10] for entry in entries), reverse=True)  # newest first


def test_the_page_of_config_fields_is_up_to_date() -> None:
    command = [sys.executable, "-m", "mdformat", "-"]
    page = reference([PretrainConfig, TuneFile])
    written = subprocess.run(command, input=page, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/config.md").read_text() == written, "run: make docs"
