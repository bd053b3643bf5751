"""Chromium, driven over its DevTools protocol."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 --window-size=1200,1500"
)


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """An open page; `requests` are the addresses that it asked for."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number, self.requests, self.errors = socket, 0, [], []

    async def call(self, method: str, **parameters: Any) -> dict:
        self.number += 1
        await self.socket.write_message(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self.socket.read_message())
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            if message.get("id") == self.number:
                return message["result"]

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return result["result"].get("value")

    async def wait(self, script: str, seconds: float = 900) -> Any:
        """Wait until a JavaScript expression is true; return its value."""
        deadline = time.monotonic() + seconds
        while not (value := await self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            await asyncio.sleep(0.1)
        return value


@contextlib.asynccontextmanager
async def open_page(address: str, profile: Path) -> AsyncIterator[Page]:
    """Open an address in a new browser."""
    from tornado.websocket import websocket_connect

    command = [find_browser(), *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    port_file = profile / "DevToolsActivePort"
    try:
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert browser.poll() is None, "Chromium has ended"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as listed:
            target = next(each for each in json.load(listed) if each["type"] == "page")
        page = Page(await websocket_connect(target["webSocketDebuggerUrl"], max_message_size=1 << 30))
        await page.call("Network.enable")
        await page.call("Runtime.enable")
        await page.call("Page.navigate", url=address)
        yield page
    finally:
        browser.terminate()
        browser.wait()
