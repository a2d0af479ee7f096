"""Nothing in the pages that people read is left to be filled in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from settings.reference import reference
from trainer.config import PretrainConfig
from tune.config import TuneFile

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholders_and_no_dead_links(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"@@|\bTODO\b|\bXXX\b", text)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_page_of_config_fields_is_up_to_date() -> None:
    assert (ROOT / "docs/config.md").read_text() == reference([PretrainConfig, TuneFile]), "run: make docs"
