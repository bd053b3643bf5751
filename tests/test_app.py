"""The page of app.py, in Chromium: it makes and repaints images, and asks no other host for anything."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import subprocess
import sys
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
BUTTONS = "[...document.querySelectorAll('button.primary, button.secondary')]"  # tabs are buttons too
BUTTON = BUTTONS + ".find(b => b.offsetParent && b.textContent.trim() == '{}')"
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


async def click(page: Page, text: str) -> None:
    await page.wait(f"!!{BUTTON.format(text)}")
    await page.run(f"{BUTTON.format(text)}.click()")


async def fill(page: Page, label: str, value: object) -> None:
    found = (
        f"[...document.querySelectorAll('label')].find(l => l.textContent.trim() == '{label}').querySelector('input')"
    )
    await page.run(f"(() => {{const i = {found}; i.value = {value}; i.dispatchEvent(new Event('input'));}})()")


def test_a_sneaker_is_made_and_no_other_host_is_asked(address, tmp_path):
    async def visit() -> None:
        async with open_page(address, tmp_path / "profile") as page:
            await page.wait(f"!!{BUTTON.format('Generate')}")
            await asyncio.sleep(1)  # until the page listens
            await click(page, "Generate")
            await page.wait("document.body.innerText.includes('GFLOPs')", seconds=120)
            assert re.search(r"fast: [\d.]+ s, [\d.]+ GFLOPs, 20 steps", await page.run("document.body.innerText"))
            source = await page.wait(f"{PICTURE}.naturalWidth == 384 && {PICTURE}.src")
            data = await page.run(
                f"fetch('{source}').then(r => r.blob()).then(b => new Promise(done => {{const f = new FileReader(); "
                "f.onload = () => done(f.result); f.readAsDataURL(b)}))",
                wait=True,
            )
            with Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as image:
                shades = np.array(image.convert("L"))
            assert shades.shape == (384, 384) and shades[:30].mean() < 30 < shades[150:300].mean(), "no sneaker"
            await fill(page, "Class", 10)
            await click(page, "Generate")
            await page.wait("document.body.innerText.includes('labels must be class numbers from 0 to 9')")
            hosts = {urlsplit(url).netloc for url in page.requests if url.startswith(("http", "ws"))}
            assert hosts == {urlsplit(address).netloc} and not page.errors

    asyncio.run(visit())


def test_a_chosen_image_is_shown_and_needs_a_mask(address, tmp_path):
    async def visit() -> None:
        async with open_page(address, tmp_path / "profile") as page:
            await page.wait(f"!!{BUTTON.format('Generate')}")
            await asyncio.sleep(1)
            await page.run(
                "[...document.querySelectorAll('[role=tab]')].find(b => /Inpaint/.test(b.innerText)).click()"
            )
            await click(page, "sneaker")
            await page.wait("!!document.querySelector('canvas')")
            await asyncio.sleep(3)
            await click(page, "Inpaint")
            await page.wait("document.body.innerText.includes('mask_image is empty')")

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
    with pytest.raises(ValueError, match="choose or upload an image"):
        app.read_editor({"background": None, "layers": []}, 32)
    assert app.read_editor(painted((0, 0, 9, 9), size=300), 32)["image"].shape == (300, 300, 3), (
        "refused by the pipeline"
    )


def test_a_run_tells_its_steps_and_ends_when_it_is_closed():
    images = app.read_editor(painted((0, 200, 384, 384)), 32)
    events = list(app.run("mar_tiny", 9, "fast", None, 0, **images))
    assert [done for _, done, _ in events[:-1]] == list(range(1, len(events[-1].plan)))
    assert app.draw_rows(events[0][0], 3).height == 320
    followed = app.run("mar_tiny", 7, "mar", None, 0)
    next(followed)
    followed.close()
    with app.ONE_AT_A_TIME:  # is free long before 64 steps are over
        pass
    for label, seed, said in (10, 0, "labels must be"), (None, 0, "class must be"), (1, 0.5, "seed must be"):
        with pytest.raises(ValueError, match=said):
            next(app.run("mar_tiny", label, "fast", None, seed))
