"""Chromium without a window, driven over its own protocol: a page is opened, typed into, asked and photographed."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.programs import needs, where

PROGRAM = "chromium"
needs_browser = needs(PROGRAM)
_PATIENCE_S = 60.0
_KEYS = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9, " ": 32}


class Page:
    """An open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count()
        self.problems: list[str] = []
        """What the page's console complained of, and exceptions."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            told = json.loads((await self._socket.receive(timeout=_PATIENCE_S)).data)
            if told.get("id") == number:
                assert "error" not in told, (method, told)
                return dict(told["result"])
            if told.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(told["params"]["exceptionDetails"]))
            if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.problems.append(str(told["params"]["entry"]))

    async def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression in the page is true; its value."""
        async with asyncio.timeout(_PATIENCE_S):
            while not (value := await self.js(expression)):
                await asyncio.sleep(0.02)
        return value

    async def press(self, key: str, control: bool = False) -> None:
        """A key of the keyboard."""
        how = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 2 if control else 0}
        text = {"text": "\r"} if key == "Enter" and not control else {"text": " "} if key == " " else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **how, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    async def write(self, text: str) -> None:
        """Text typed where the focus is."""
        await self.call("Input.insertText", text=text)

    async def point(self, element: str) -> None:
        """The mouse onto an element, found by CSS."""
        place = await self.js(
            f"(() => {{const r = document.querySelector({json.dumps(element)}).getClientRects()[0];"
            "return [r.x + r.width / 2, r.y + r.height / 2]})()"
        )
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])

    async def size(self, width: int, height: int) -> None:
        """Of the window, in CSS pixels."""
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **how)

    async def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def opened(url: str, width: int = 1280, height: int = 900) -> AsyncIterator[Page]:
    """``url`` in a browser of its own."""
    folder = Path(tempfile.mkdtemp(prefix="browser-"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    options += ["--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={folder}"]
    command = [str(where(PROGRAM)), *options, "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        async with asyncio.timeout(_PATIENCE_S):
            while not port.exists() or not port.read_text().strip():
                assert process.poll() is None, "the browser has ended"
                await asyncio.sleep(0.02)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{address}/json/list") as answer:
                (target,) = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                await page.size(width, height)
                await page.call("Page.navigate", url=url)
                await page.until("document.readyState === 'complete'")
                yield page
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
