"""The page in a real browser: by mouse and keyboard, on a wide screen and a phone's, in black and white."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import evals.play
from tests.browser import Page, needs_browser, opened
from tests.evals.play.serving import counted, player, served

PROMPT = "def read(self"
HERE = "document.querySelector('#panel-{} .here').textContent"
IDLE = "!document.getElementById('go').disabled && document.querySelectorAll('#panel-0 .t').length > 0"


def test_nothing_is_fetched_from_elsewhere() -> None:
    files = [path for path in Path(evals.play.__file__).parent.iterdir() if path.suffix in (".html", ".css", ".js")]
    assert len(files) == 3
    for path in files:
        assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|innerHTML|eval\(", path.read_text()), path.name


def test_the_scale_darkens_evenly() -> None:
    """Each step is darker than the one before to anybody's eyes: luminance falls, and letters keep their contrast."""
    css = (Path(evals.play.__file__).parent / "page.css").read_text()
    colours = dict(re.findall(r"\.(l\d) \{ background: #([0-9a-f]{6})", css))
    light = [_luminance(colours[f"l{level}"]) for level in range(9)]
    assert light == sorted(light, reverse=True) and min(a - b for a, b in itertools.pairwise(light)) > 0.015
    for level, behind in enumerate(light):
        letters = 1.0 if level >= 6 else 0.006  # white, or #111
        assert (max(letters, behind) + 0.05) / (min(letters, behind) + 0.05) >= 4.5, level


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def browse(url: str, look: Callable[[Page], Awaitable[None]], width: int = 1280) -> None:
    async def run() -> None:
        async with opened(url, width) as page:
            await page.until("document.getElementById('facts').textContent.includes('positions')")
            await look(page)
            assert page.problems == []

    asyncio.run(run())


@needs_browser
def test_two_densities_side_by_side(corpus: dict[str, Any]) -> None:
    made = player("layer", corpus, dial=True, max_positions=1024)

    async def look(page: Page) -> None:
        await page.js("document.getElementById('prompt').focus()")
        await page.write(PROMPT)
        await page.js("document.getElementById('max_tokens').value = 12")
        for control in ("as-trained", "compare"):  # by the keyboard
            await page.js(f"document.getElementById('{control}').focus()")
            await page.press(" ")
        await page.js("document.getElementById('density-0').focus()")
        await page.press("Home")  # the lowest density
        await page.press("Enter", control=True)
        await page.until(IDLE)
        assert await page.js("document.querySelector('#panel-0 h2').textContent") == "Density 0.25"
        assert await page.js("document.querySelector('#panel-1 h2').textContent") == "Density 1.00"
        assert await page.js("document.querySelectorAll('#panel-0 .t.l0').length") == 12
        assert await page.js("document.querySelectorAll('#panel-1 .t.l8').length") == 12
        stats = await page.js("document.querySelector('#panel-0 .stats').textContent")
        assert re.match(
            r"12 tokens, [\d,.]+ tokens/s; layers a token: 0\.00 of 4; [\d.]+ kFLOP, prompt included: ", stats
        )
        await page.js("document.querySelector('#panel-1 .text').focus()")
        first = await page.js(HERE.format(1))
        await page.press("End")
        last = await page.js("document.querySelector('#panel-1 .token').textContent")
        await page.press("ArrowLeft")
        before = await page.js("document.querySelector('#panel-1 .token').textContent")
        assert first and last.startswith("12: ") and before.startswith("11: ") and "4 of 4 layers" in before
        await page.point("#panel-0 .t")
        assert (await page.js("document.querySelector('#panel-0 .token').textContent")).startswith("1: ")
        assert await page.js("document.querySelectorAll('#panel-0 .ran .off').length") == 4

    with served(made) as address:
        browse(address, look)


@needs_browser
def test_votes_on_a_phone(corpus: dict[str, Any]) -> None:
    made = player("ensemble", corpus, max_positions=1024)

    async def look(page: Page) -> None:
        assert await page.js("document.documentElement.scrollWidth") <= 390
        assert "it has no dial" in await page.js("document.getElementById('dial').innerText")
        assert not await page.js("document.getElementById('dials').checkVisibility()")
        await page.js("document.getElementById('go').click()")
        await page.until(IDLE)
        await page.js("document.querySelector('#panel-0 .t').click()")  # a tap
        rows = await page.js("[...document.querySelectorAll('.token tbody tr')].map(r => r.innerText)")
        assert len(rows) == 2 and rows[0].startswith("2\t") and rows[1].startswith("3\t") and rows[0].endswith("%")
        assert await page.js("document.documentElement.scrollWidth") <= 390
        assert not await page.js("document.querySelector('.t sup').checkVisibility()")
        await page.js("document.getElementById('numbers').click()")
        assert await page.js("document.querySelector('.t sup').checkVisibility()")
        assert await page.js("[...document.querySelectorAll('.t sup')].every(s => s.textContent >= 0)")

    with served(made) as address:
        browse(address, look, width=390)


@needs_browser
def test_stopping_and_refusals_are_told(corpus: dict[str, Any]) -> None:
    made = player("dense", corpus, max_positions=4096)
    made.most_new_tokens = 4000

    async def look(page: Page) -> None:
        await page.js("document.getElementById('max_tokens').value = 4000")
        with counted(made.opened.decoder) as passes:
            await page.js("document.getElementById('go').click()")
            await page.until("document.querySelectorAll('.t').length > 3")
            await page.press("Escape")
            await page.until(IDLE)
            assert (await page.js("document.querySelector('.stats').textContent")).endswith("; stopped")
            await asyncio.sleep(0.2)
            ran = len(passes)
            await asyncio.sleep(0.2)
            assert ran == len(passes) < 4000
        made.opened.decoder.config.__dict__["max_positions"] = 64  # as a long prompt would
        await page.js("document.getElementById('go').click()")
        await page.until("!document.getElementById('error').hidden")
        told = await page.js("document.getElementById('error').textContent")
        assert told.startswith("a prompt of 1 tokens and 4000 new ones exceed the model's 64 positions")
        page.problems.clear()  # the console says 400, too

    with served(made) as address:
        browse(address, look)
