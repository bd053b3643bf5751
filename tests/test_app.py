"""The page of app.py, in Chromium: it makes and repaints images, and asks no other host for anything."""

import asyncio
import io
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import Page, find_browser, open_page
from PIL import Image
from ranks import free_port

import app

ROOT = Path(__file__).parents[1]
BUTTON = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() == '{}')"
PICTURE = "[...document.querySelectorAll('[data-testid=image] img, .image-container img')].find(i => i.offsetParent)"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio", reason="Gradio is not installed: the page was not opened")
    pytest.importorskip("tornado", reason="Tornado is not installed: Chromium cannot be driven")
    if find_browser() is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    port = free_port()
    command = [sys.executable, "-u", "app.py", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert any(f"http://127.0.0.1:{port}" in line for line in server.stdout)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


async def click(page: Page, text: str, effect: str) -> None:
    """Click a button until an expression is true: at first, the page may not listen yet."""
    await page.wait(f"!!{BUTTON.format(text)}")
    for _ in range(8):
        await page.run(f"{BUTTON.format(text)}.click()")
        for _ in range(300):
            if await page.run(effect):
                return
            await asyncio.sleep(0.1)
    raise AssertionError(f"never true: {effect}")


def test_a_sneaker_is_made_and_no_other_host_is_asked(address, tmp_path):
    async def visit() -> None:
        async with open_page(address, tmp_path / "profile") as page:
            await click(page, "Generate", "document.body.innerText.includes('fast: ')")
            await page.wait("document.body.innerText.includes('GFLOPs')", seconds=120)
            assert re.search(r"fast: [\d.]+ s, [\d.]+ GFLOPs, 20 steps", await page.run("document.body.innerText"))
            source = await page.wait(f"{PICTURE}.naturalWidth == 384 && {PICTURE}.src")
            with urllib.request.urlopen(source) as response, Image.open(io.BytesIO(response.read())) as image:
                shades = np.array(image.convert("L"))
            assert shades.shape == (384, 384) and shades[:30].mean() < 30 < shades[150:300].mean(), "no sneaker"
            await click(page, "sneaker", "!!document.querySelector('canvas')")
            await asyncio.sleep(3)
            await click(page, "Generate", "document.body.innerText.includes('mask_image must be white')")
            hosts = {urlsplit(url).netloc for url in page.requests if url.startswith(("http", "ws"))}
            assert hosts == {urlsplit(address).netloc} and not page.errors

    asyncio.run(visit())


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
