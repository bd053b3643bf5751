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
from PIL import Image
from torch import Tensor

from models import METHODS, PRESETS, MARPipeline, Plan
from models.lazymar.plan import Step
from util.cli import Parser, number
from util.errors import InputError, exits_cleanly
from util.images import to_pixels
from util.pipeline import PipelineOutput

SHOWN = 384  # pixels: side of an image on the page, at least
EXAMPLES = sorted((Path(__file__).parent / "examples" / "fashion_mnist").glob("*.png"))
ABOUT = """# LazyMAR
Images by masked autoregression, with and without caching. Grey tokens are not known yet. Classes of `mar_tiny`:
0 T-shirt, 1 trousers, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot."""
load = lru_cache(maxsize=1)(MARPipeline.from_pretrained)  # one model stays in memory
ONE_AT_A_TIME = threading.Lock()
REFRESH, LAZY, REUSED = (31, 78, 140), (90, 150, 210), (215, 215, 215)


def run(name: str, label: Any, method: str, cfg: float | None, seed: Any, **images: Any) -> Iterator[Any]:
    """Yield (plan, number of finished steps, pixels [H, W, 3]) after steps but the last, then the pipeline's output.

    A thread does the work; it ends when the iterator is closed, at its next step. Raises ValueError for bad input.
    """
    events, stop = queue.SimpleQueue[Any](), threading.Event()

    def on_step(pipe: MARPipeline, index: int, step: Step, tensors: Mapping[str, Tensor]) -> None:
        if stop.is_set():
            raise InterruptedError
        if step.stop == pipe.model.seq_len:
            return  # the output follows
        side = pipe.model.img_size // pipe.model.grid_size
        known = tensors["known"][0].view(pipe.model.grid_size, -1).cpu().numpy().repeat(side, 0).repeat(side, 1)
        pixels = np.where(known[..., None], to_pixels(pipe.decode(tensors["latents"]))[0], 128).astype(np.uint8)
        events.put((pipe.plan, index + 1, pixels))

    def work() -> None:
        try:
            with ONE_AT_A_TIME:
                settings = {"method": method or "mar", "cfg": cfg, "seed": whole(seed, "seed"), **images}
                settings |= {"callback_on_step_end": on_step, "progress": False}
                events.put(load(name)(whole(label, "class"), **settings))
        except Exception as error:
            events.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        event: Any = None
        while not isinstance(event, PipelineOutput):
            event = events.get()
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stop.set()


def whole(value: Any, name: str) -> int:
    if value is not None and value == int(value) >= 0:
        return int(value)
    raise ValueError(f"{name} must be a whole number of at least 0, not {value}")


def enlarge(pixels: Any) -> Image.Image:
    pixels = np.asarray(pixels)
    scale = -(-SHOWN // len(pixels))
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def describe(output: PipelineOutput) -> str:
    full = sum(step.refresh for step in output.plan)
    cost = f"{output.seconds:.1f} s, {output.flops.total / 1e9:,.1f} GFLOPs"
    return f"{cost}, {len(output.plan)} steps, {full} of which compute everything"


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
    """Return the image and the mask of Gradio's editor; an enlarged image is reduced to `size` pixels again.

    Raises ValueError without an image.
    """
    if not value or value.get("background") is None:
        raise ValueError("choose or upload an image, and paint over the part that is to be made anew")
    image = np.asarray(value["background"].convert("RGB"))
    mask = np.any([np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in value["layers"]], axis=0)
    mask = np.broadcast_to(mask, image.shape[:2])
    scale = max(1, len(image) // size)
    if image.shape[:2] == (scale * size, scale * size):
        image = image.reshape(size, scale, size, scale, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        mask = mask.reshape(size, scale, size, scale).any(axis=(1, 3))
    return {"image": image, "mask_image": mask}


def make_page() -> Any:
    import gradio as gr

    picture = partial(gr.Image, buttons=["download"])

    def make(name, label, method, cfg, seed, beside, editor=False):
        lines = []
        yield None, None, None, ""
        try:
            images = {} if editor is False else read_editor(editor, PRESETS[name].architecture["img_size"])
            for place, chosen in enumerate([method, "mar"] if beside else [method]):
                for event in run(name, label, chosen, cfg, seed, **images):
                    if isinstance(event, PipelineOutput):
                        plan, done, pixels, figures = event.plan, len(event.plan), event.images[0], describe(event)
                    else:
                        plan, done, pixels = event
                        figures = f"step {done} of {len(plan)}"
                    line = "\n\n".join([*lines, f"**{chosen}**: {figures}"])
                    shown = [gr.skip(), gr.skip(), draw_rows(plan, done) if place == 0 else gr.skip(), line]
                    shown[place] = enlarge(pixels)
                    yield shown
                lines.append(line)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="LazyMAR", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            name = gr.Dropdown(list(PRESETS), value="mar_tiny", label="Model")
            label = gr.Number(7, label="Class")
            method = gr.Dropdown(list(METHODS), value="fast", label="Method", allow_custom_value=True)
            cfg = gr.Number(PRESETS["mar_tiny"].cfg, label="CFG scale")
            seed = gr.Number(0, label="Seed")
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
