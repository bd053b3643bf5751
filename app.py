"""A page to play with: choose a class and a method, watch tokens become known, and inpaint.

pip install -r requirements-app.txt
python app.py   # then open http://127.0.0.1:7860; served to this machine alone, unless --host says otherwise
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from models import METHODS, PRESETS, MARPipeline, Plan
from models.lazymar.plan import Step
from util.cli import Parser, number
from util.errors import InputError, exits_cleanly
from util.images import to_pixels

SHOWN = 384  # pixels: side of an image on the page, at least
EXAMPLES = sorted((Path(__file__).parent / "examples" / "fashion_mnist").glob("*.png"))
ABOUT = """# LazyMAR
Images by masked autoregression, with and without caching. Grey tokens are not known yet. Classes of `mar_tiny`:
0 T-shirt, 1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot."""
load = lru_cache(maxsize=1)(MARPipeline.from_pretrained)  # one model stays in memory
ONE_AT_A_TIME = threading.Lock()
REFRESH, LAZY, REUSED = (31, 78, 140), (90, 150, 210), (215, 215, 215)


def run(name: str, label: int, method: str, cfg: float | None, seed: int, **images: Any) -> Iterator[Any]:
    """Yield (plan, number of finished steps, image, text) after each step, then for the finished image.

    A thread does the work; it ends when the iterator is closed, at its next step. Raises ValueError for bad input.
    """
    events, stop = queue.SimpleQueue[Any](), threading.Event()

    def on_step(pipe: MARPipeline, index: int, step: Step, tensors: Mapping[str, Tensor]) -> None:
        if stop.is_set():
            raise InterruptedError
        side = pipe.model.img_size // pipe.model.grid_size
        known = tensors["known"][0].view(pipe.model.grid_size, -1).cpu().numpy().repeat(side, 0).repeat(side, 1)
        pixels = np.where(known[..., None], to_pixels(pipe.decode(tensors["latents"]))[0], 128).astype(np.uint8)
        events.put((pipe.plan, index + 1, pixels, f"step {index + 1}"))

    def work() -> None:
        try:
            with ONE_AT_A_TIME:
                settings = {"method": method or "mar", "cfg": cfg, "seed": seed, **images}
                output = load(name)(label, **settings, callback_on_step_end=on_step, progress=False)
            costs = f"{output.seconds:.1f} s, {output.flops.total / 1e9:,.1f} GFLOPs, {len(output.plan)} steps"
            events.put((output.plan, len(output.plan), output.images[0], costs))
            events.put(None)
        except Exception as error:
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        for event in iter(events.get, None):
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stop.set()


def enlarge(pixels: Any) -> Image.Image:
    """Return an image of about `SHOWN` pixels or more."""
    pixels = np.asarray(pixels)
    scale = -(-SHOWN // len(pixels))
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def draw_rows(plan: Plan, done: int) -> Image.Image:
    """Draw a column for each finished step: the decoder rows that it computes after the prune layer, and the others."""
    width = max(4, 800 // len(plan))
    picture = np.full((plan.num_rows, width * len(plan), 3), 255, np.uint8)
    for step in plan.steps[:done]:
        column = picture[:, width * step.index : width * (step.index + 1) - 1]
        column[:] = REUSED
        column[plan.num_rows - step.num_recomputed :] = REFRESH if step.refresh else LAZY
    return Image.fromarray(picture)


def read_editor(value: Mapping[str, Any] | None, size: int) -> dict[str, Any]:
    """Return the image and the mask of Gradio's editor in `size` x `size` pixels, cropped to a square if need be.

    Raises ValueError without an image.
    """
    if not value or value.get("background") is None:
        raise ValueError("choose or upload an image, and paint over the part that is to be made anew")
    painted = Image.new("L", value["background"].size)
    for layer in value["layers"]:
        painted = ImageChops.lighter(painted, layer.convert("RGBA").getchannel("A"))
    image, mask = (
        ImageOps.fit(each, (size, size), Image.Resampling.BOX) for each in (value["background"].convert("RGB"), painted)
    )
    return {"image": image, "mask_image": np.asarray(mask) > 0}


def make_page() -> Any:
    import gradio as gr

    picture = partial(gr.Image, buttons=["download"])

    def make(name, label, method, cfg, seed, beside, *editor):
        lines = []
        yield None, None, None, ""
        try:
            if label is None or seed is None:
                raise ValueError("class and seed must be whole numbers")
            images = read_editor(editor[0], PRESETS[name].architecture["img_size"]) if editor else {}
            for place, chosen in enumerate([method, "mar"] if beside else [method]):
                for plan, done, image, text in run(name, label, chosen, cfg, seed, **images):
                    line = "\n\n".join([*lines, f"**{chosen}**: {text}"])
                    shown = [gr.skip(), gr.skip(), draw_rows(plan, done) if place == 0 else gr.skip(), line]
                    shown[place] = enlarge(image)
                    yield shown
                lines.append(line)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="LazyMAR", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            name = gr.Dropdown(list(PRESETS), value="mar_tiny", label="Model")
            label = gr.Number(7, label="Class", precision=0, minimum=0)
            method = gr.Dropdown(list(METHODS), value="fast", label="Method", allow_custom_value=True)
            cfg = gr.Number(PRESETS["mar_tiny"].cfg, label="CFG scale")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            beside = gr.Checkbox(False, label="Baseline beside it")
        name.change(lambda name: PRESETS[name].cfg, name, cfg, api_visibility="private")
        for title in ("Generate", "Inpaint"):
            with gr.Tab(title):
                inputs: list[Any] = [name, label, method, cfg, seed, beside]
                if title == "Inpaint":
                    brush = gr.Brush(colors=["#ff4040"], default_size=40)
                    editor = gr.ImageEditor(type="pil", label="Paint over what is to be made anew", brush=brush)
                    with gr.Row():
                        for path in EXAMPLES:
                            choose = gr.Button(path.stem.replace("_", " "), size="sm")
                            show = partial(enlarge, Image.open(path).convert("RGB"))
                            choose.click(show, None, editor, api_visibility="private")
                    inputs.append(editor)
                with gr.Row():
                    start, stop = gr.Button(title, variant="primary"), gr.Button("Stop")
                text = gr.Markdown(min_height=60)
                with gr.Row():
                    result, baseline = picture(label="Image"), picture(label="Baseline")
                rows = picture(label="Decoder rows: computed (blue, dark at refresh steps), reused (grey)", height=240)
                outputs = [result, baseline, rows, text]
                once: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress_on": [text]}
                running = start.click(make, inputs, outputs, **once)
                stop.click(None, cancels=[running])
    return page


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves every network")
    parser.add_argument("--port", type=number(int, 1, 65535), default=7860, metavar="N", help="port of the page")
    args = parser.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no request leaves this machine
    try:
        import gradio as gr
    except ImportError:
        raise InputError("the page needs Gradio: run `pip install -r requirements-app.txt`") from None
    theme = gr.themes.Default(font=["system-ui"], font_mono=["monospace"])  # no fonts of other hosts
    make_page().launch(server_name=args.host, server_port=args.port, theme=theme, share=False)


if __name__ == "__main__":
    sys.exit(main())
