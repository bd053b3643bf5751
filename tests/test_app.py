"""The page of app.py, in Chromium: it makes and repaints images, and asks no other host for anything."""

import asyncio
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import free_port

import app

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 --window-size=1200,1500"
)
CLICK = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() == '{}').click()"
PICTURE = "[...document.querySelectorAll('[data-testid=image] img, .image-container img')].find(i => i.offsetParent)"


@contextlib.contextmanager
def started(*command: str) -> Iterator[str]:
    """Start a program that prints its address; yield host and port."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield next(found[1] for line in process.stdout if (found := re.search(r"//(127\.0\.0\.1:\d+)", line)))
    finally:
        process.terminate()
        process.communicate()


class Page:
    """An open page, driven over Chromium's DevTools protocol; `events` is what it reports."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number, self.events = socket, 0, []

    async def call(self, method: str, **parameters: Any) -> dict:
        self.number += 1
        await self.socket.write_message(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (message := json.loads(await self.socket.read_message())).get("id") != self.number:
            self.events.append(message)
        return message["result"]

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return result["result"].get("value")

    async def wait(self, script: str, click: str = "") -> Any:
        """Wait until an expression is true. Click every 30 seconds: at first, the page may not listen yet."""
        for attempt in range(9000):
            if click and attempt % 300 == 0:
                await self.run(CLICK.format(click))
            if value := await self.run(script):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {script}")


def test_a_sneaker_is_made_and_no_other_host_is_asked(tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed: the page was not opened")
    websocket = pytest.importorskip("tornado.websocket", reason="Tornado is not installed: Chromium cannot be driven")
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")

    async def visit(address: str, browser: str) -> None:
        with urllib.request.urlopen(f"http://{browser}/json") as listed:
            target = next(each for each in json.load(listed) if each["type"] == "page")
        page = Page(await websocket.websocket_connect(target["webSocketDebuggerUrl"], max_message_size=1 << 30))
        await page.call("Network.enable")
        await page.call("Runtime.enable")
        await page.call("Page.navigate", url=f"http://{address}")
        await page.wait("document.body?.innerText.includes('Generate')")
        await page.wait("document.body.innerText.includes('fast: ')", click="Generate")
        await page.wait("document.body.innerText.includes('GFLOPs')")
        assert re.search(r"fast: [\d.]+ s, [\d.]+ GFLOPs, 16 steps", await page.run("document.body.innerText"))
        source = await page.wait(f"{PICTURE}.naturalWidth == 384 && {PICTURE}.src")
        with urllib.request.urlopen(source) as response, Image.open(io.BytesIO(response.read())) as image:
            shades = np.array(image.convert("L"))
        assert shades.shape == (384, 384) and shades[:30].mean() < 30 < shades[150:300].mean(), "no sneaker"
        await page.run(CLICK.format("sneaker"))
        await asyncio.sleep(3)
        await page.wait("document.body.innerText.includes('mask_image must be white')", click="Generate")
        urls = [event["params"]["request"]["url"] for event in page.events if "request" in event.get("params", {})]
        assert {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))} == {address}
        assert all(event["method"] != "Runtime.exceptionThrown" for event in page.events)

    server = [sys.executable, "-u", "app.py", "--port", str(free_port())]
    chromium = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "about:blank"]
    with started(*server) as address, started(*chromium) as browser:
        asyncio.run(visit(address, browser))


# Without a browser


def painted(box: tuple[int, int, int, int], size: int = 384) -> dict:
    layer = Image.new("RGBA", (size, size))
    layer.paste((255, 64, 64, 255), box)
    return {
        "background": app.enlarge(Image.open(app.EXAMPLES[0]).convert("RGB")).resize((size, size)),
        "layers": [layer],
    }


def test_what_was_painted_becomes_a_mask_of_the_models_size():
    read = app.read_editor(painted((13, 24, 100, 60)), 32)
    original = Image.open(app.EXAMPLES[0]).convert("RGB")
    assert np.array_equal(read["image"], np.array(original))
    rows, columns = np.nonzero(read["mask_image"])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 4, 1, 8)
    assert app.read_editor(painted((0, 0, 9, 9), size=300), 32)["image"].size == (32, 32)
    assert app.read_editor({"background": None, "layers": []}, 32) == {}


def test_a_run_tells_its_steps_and_ends_when_it_is_closed():
    images = app.read_editor(painted((0, 200, 384, 384)), 32)
    texts = [text for _, _, text in app.run("mar_tiny", 9, method="fast", **images)]
    assert texts[:-1] == [f"step {number}" for number in range(1, len(texts))] and "GFLOPs" in texts[-1]
    followed = app.run("mar_tiny", 7)
    next(followed)
    followed.close()
    app.WORKER.submit(int).result()  # waits for the worker, which is free long before 64 steps are over
    with pytest.raises(ValueError, match="class_labels must be"):
        next(app.run("mar_tiny", 10, method="fast"))
