"""Headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Self

import aiohttp

__all__ = ["Browser"]


class Browser:
    """One page in a browser of its own; ``folder`` is for what it keeps."""

    def __init__(self, folder: Path, *, width: int = 1000, height: int = 700) -> None:
        self._process = subprocess.Popen(
            [
                *("chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-dev-shm-usage", "--remote-debugging-port=0"),
                *(f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"ws://\S+?:(\d+)/", line):
                self._port = found[1]
                break
        else:
            raise RuntimeError("Chromium does not start")
        self._number = 0
        self.errors: list[str] = []
        """What went wrong in the page's scripts."""
        self._runner = asyncio.Runner()
        self._runner.run(self._connect())

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60))
        answer = await self._session.get(f"http://127.0.0.1:{self._port}/json")
        pages = [target for target in await answer.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(
            pages[0]["webSocketDebuggerUrl"], max_msg_size=0
        )
        await self._call("Runtime.enable")
        await self._call("Page.enable")

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._socket.receive_json(timeout=60)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        return message

    async def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while (message := await self._receive()).get("id") != self._number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        result: dict[str, Any] = message["result"]
        return result

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        return self._runner.run(self._call(method, **parameters))

    def open(self, path: Path) -> None:
        """Go to a page, and wait until it is there."""
        self.errors.clear()
        self.call("Page.navigate", url=f"file://{os.path.abspath(path)}")
        while self.run("document.readyState") != "complete" or not self.run("location.pathname"):
            pass

    def run(self, code: str) -> Any:
        """The value of an expression in the page. Raises RuntimeError."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """mouseMoved, mousePressed, mouseReleased or mouseWheel."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float, *, shift: bool = False) -> None:
        """A click, with Shift held or not."""
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1, modifiers=8 if shift else 0)

    def screenshot(self, path: Path) -> None:
        """What is to be seen, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        async def close() -> None:
            await self._socket.close()
            await self._session.close()

        self._runner.run(close())
        self._runner.close()
        self._process.terminate()
        self._process.communicate(timeout=60)
