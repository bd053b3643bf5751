"""A page to play with: choose a class and a method, watch tokens become known, and inpaint.

pip install -r requirements-app.txt
python app.py   # then open http://127.0.0.1:7860; served to this machine alone, unless --host says otherwise
"""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from models import METHODS, PRESETS, MARPipeline, Plan
from models.lazymar.plan import Step
from util.cli import Parser, number
from util.errors import InputError, exits_cleanly
from util.images import to_pixels
from util.report.figures import rows_by_step

SHOWN = 384  # pixels: side of an image on the page, at least
EXAMPLES = sorted((Path(__file__).parent / "examples" / "fashion_mnist").glob("*.png"))
ABOUT = """# LazyMAR
Images by masked autoregression, with and without caching. Grey tokens are not known yet. Classes of `mar_tiny`:
0 T-shirt, 1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot."""
load = lru_cache(maxsize=1)(MARPipeline.from_pretrained)  # one model stays in memory
WORKER = ThreadPoolExecutor(max_workers=1)  # one image is made at a time


def run(name: str, label: int, **settings: Any) -> Iterator[tuple[Plan, Any, str]]:
    """Yield the plan, the image so far and a text after each step, then with the finished image.

    A thread does the work; when the iterator is closed, it ends at its next step. Raises ValueError for bad input.
    """
    frames, closed = SimpleQueue[Any](), Event()

    def on_step(pipe: MARPipeline, index: int, step: Step, tensors: Mapping[str, Tensor]) -> None:
        if closed.is_set():
            raise InterruptedError
        side = pipe.model.img_size // pipe.model.grid_size
        known = tensors["known"][0].view(pipe.model.grid_size, -1).cpu().numpy().repeat(side, 0).repeat(side, 1)
        pixels = np.where(known[..., None], to_pixels(pipe.decode(tensors["latents"]))[0], 128).astype(np.uint8)
        frames.put((pipe.plan, pixels, f"step {index + 1}"))

    def work() -> Any:
        try:
            return load(name)(label, **settings, callback_on_step_end=on_step, progress=False)
        finally:
            frames.put(None)

    output = WORKER.submit(work)
    try:
        yield from iter(frames.get, None)
    finally:
        closed.set()
    images, plan, flops, seconds = output.result()
    yield plan, images[0], f"{seconds:.1f} s, {flops.total / 1e9:,.1f} GFLOPs, {len(plan)} steps"


def enlarge(pixels: Any) -> Image.Image:
    """Return an image of about `SHOWN` pixels or more."""
    pixels = np.asarray(pixels)
    scale = -(-SHOWN // len(pixels))
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def read_editor(value: Mapping[str, Any] | None, size: int) -> dict[str, Any]:
    """Return the image and the mask of Gradio's editor in `size` x `size` pixels, cropped to a square if need be.

    Nothing without an image.
    """
    if not value or value["background"] is None:
        return {}
    painted = Image.new("L", value["background"].size)
    for layer in value["layers"]:
        painted = ImageChops.lighter(painted, layer.convert("RGBA").getchannel("A"))
    image, mask = (
        ImageOps.fit(each, (size, size), Image.Resampling.BOX) for each in (value["background"].convert("RGB"), painted)
    )
    return {"image": image, "mask_image": np.asarray(mask) > 0}


def make_page() -> Any:
    import gradio as gr

    def make(name, label, method, cfg, seed, beside, editor):
        shown = [None, None, None, ""]
        yield shown
        try:
            if label is None or seed is None:
                raise ValueError("class and seed must be whole numbers")
            settings = {"cfg": cfg, "seed": seed, **read_editor(editor, PRESETS[name].architecture["img_size"])}
            for place, chosen in enumerate([method, "mar"] if beside else [method]):
                before = shown[3]
                for plan, image, text in run(name, label, method=chosen or "mar", **settings):
                    shown[place] = enlarge(image)
                    shown[2] = shown[2] or Image.open(io.BytesIO(rows_by_step(plan)))
                    shown[3] = f"{before}\n\n**{chosen}**: {text}"
                    yield shown
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
        with gr.Row():
            start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
            examples = [gr.Button(path.stem.replace("_", " ")) for path in EXAMPLES]
        text = gr.Markdown(min_height=60)
        with gr.Row():
            result, baseline = gr.Image(label="Image"), gr.Image(label="Baseline")
            brush = gr.Brush(colors=["#ff4040"], default_size=40)
            editor = gr.ImageEditor(type="pil", label="To inpaint, paint here", brush=brush)
        rows = gr.Image(show_label=False, height=400)
        for path, button in zip(EXAMPLES, examples):
            show = partial(enlarge, Image.open(path).convert("RGB"))
            button.click(show, None, editor, api_visibility="private")
        inputs, outputs = [name, label, method, cfg, seed, beside, editor], [result, baseline, rows, text]
        running = start.click(make, inputs, outputs, show_progress_on=[text])
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
