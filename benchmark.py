"""Time sampling, baseline against LazyMAR, by model, batch size, steps and number format; no weights are needed.

    python benchmark.py --models mar_base --batch_sizes 1 8 --dtypes float32 bfloat16
    python benchmark.py --models mar_huge --batch_sizes 1 128 --dtypes bfloat16 --device cuda --plot speed.png

Speed does not depend on the weights, so they are random. The two methods take turns, and each figure is the median of
`--repeats` runs; the machine's own rate of matrix products is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from models import (
    MAR,
    PRESETS,
    AutoencoderKL,
    CachePolicy,
    ImageNoise,
    Sampler,
    count_flops,
    create_model,
    sample_tokens,
)
from models.lazymar.flops import Flops, count_decoding_flops
from models.vae import for_inference
from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write
from util.machine import DTYPES, choose_device, choose_dtype, describe, dtype_name, processor_name
from util.reproduction.timing import random_model, timed
from util.runs.images import decode
from util.runs.options import Options, check

METHODS = {"baseline": None, "LazyMAR": CachePolicy()}
SLOW_PRODUCT_SECONDS = 0.1  # no larger ones are timed then
GPU_WARMUPS = 2  # the first batch runs as it stands, the second is recorded
# On a CPU weights are packed at their first use: a short run has every kind of step.
CPU_WARMUP = {"num_iter": 8, "num_sampling_steps": 8}


@dataclass
class Measurement:
    """One method in one setting. Seconds are per image; FLOPs are one image's."""

    model: str
    batch_size: int
    num_iter: int
    dtype: str
    method: str
    seconds: float  # of sampling, the median run
    fastest: float
    slowest: float
    vae_seconds: float
    flops: Flops
    vae_flops: int
    share_of_peak: float  # of the measured rate of matrix products
    peak_bytes: int


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large square matrix products, the best of a few: smaller ones where the dtype makes these slow."""
    size, largest = 256, 8192 if device.type == "cuda" else 2048
    while True:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = min(timed(partial(torch.matmul, a, b), device) for _ in range(8))
        if size == largest or seconds > SLOW_PRODUCT_SECONDS:
            return 2 * size**3 / seconds
        size *= 2


@torch.inference_mode()
def measure(
    model: MAR, name: str, batch_size: int, num_iter: int, dtype: str, args: argparse.Namespace, rate: float
) -> list[Measurement]:
    """The methods on one model, in turn. `rate` is the peak that they are compared with, in FLOP/s."""
    device = model.mask_token.device
    settings = {"num_iter": num_iter, "cfg": PRESETS[name].cfg, "num_sampling_steps": args.num_sampling_steps}
    seconds, peaks = time_methods(model, batch_size, settings, args, f"{name}, batch {batch_size}, {dtype}")

    vae = for_inference(AutoencoderKL(**PRESETS[name].vae), DTYPES[dtype]).to(device)
    side = model.grid_size * model.patch_size
    latents = torch.randn(batch_size, model.vae_embed_dim, side, side, device=device)
    vae_seconds = min(timed(lambda: decode(vae, latents), device) for _ in range(2)) / batch_size

    with torch.device("meta"):
        shapes, vae_shapes = create_model(name), AutoencoderKL(**PRESETS[name].vae)
    vae_flops = count_decoding_flops(vae_shapes, side)
    results = []
    for method in args.methods:
        flops, median = count_flops(shapes, **settings, cache=METHODS[method]), statistics.median(seconds[method])
        results.append(
            Measurement(
                model=name,
                batch_size=batch_size,
                num_iter=num_iter,
                dtype=dtype,
                method=method,
                seconds=median,
                fastest=min(seconds[method]),
                slowest=max(seconds[method]),
                vae_seconds=vae_seconds,
                flops=flops,
                vae_flops=vae_flops,
                share_of_peak=flops.total / median / rate,
                peak_bytes=peaks[method],
            )
        )
    return results


def time_methods(
    model: MAR, batch_size: int, settings: dict, args: argparse.Namespace, description: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per image of each run, and bytes of memory at the most, by method."""
    device = model.mask_token.device
    labels = torch.arange(batch_size) % model.class_num
    noise = ImageNoise(model, 0, range(batch_size), args.num_sampling_steps, device)
    runs, seconds, peaks = {}, {method: [] for method in args.methods}, {}
    with tqdm(total=len(args.methods) * (1 + args.repeats), desc=description, leave=False) as progress:
        for method in args.methods:
            cache = METHODS[method]
            runs[method] = partial(Sampler(model, **settings, cache=cache), labels, noise)
            if device.type == "cuda":
                weights = sum(parameter.nbytes for parameter in model.parameters())
                peaks[method] = weights + gpu_peak(runs[method], device)
            else:
                sample_tokens(model, labels, **{**settings, **CPU_WARMUP}, cache=cache)
            progress.update()
        for _ in range(args.repeats):
            for method, run in runs.items():
                seconds[method].append(timed(run, device) / batch_size)
                if device.type == "cpu":
                    peaks[method] = cpu_peak()
                progress.update()
    if args.profile:
        print(profiled(runs[args.methods[-1]], device))
    return seconds, peaks


def gpu_peak(run: Callable[[], object], device: torch.device) -> int:
    """Run the warm-up, and return how many bytes more PyTorch takes at the most.

    Taken, not in use: recorded graphs keep theirs, and a replay is not seen to use any.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    for _ in range(GPU_WARMUPS):
        run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - before


def cpu_peak() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def profiled(run: Callable[[], object], device: torch.device) -> str:
    """The operations that take longest, of one run."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        timed(run, device)
    return profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=15)


def table(pair: list[Measurement]) -> str:
    """A line per method; the FLOP counts are the encoder's, the decoder's, the head's and, apart, the VAE's."""
    lines = []
    for result in pair:
        spread = f"({result.fastest:.3f} to {result.slowest:.3f})"
        parts = " + ".join(f"{part / 1e12:.3f}" for part in result.flops)
        vae_share = result.vae_seconds / (result.seconds + result.vae_seconds)
        lines.append(
            f"{result.model:10s} batch {result.batch_size:<4d}steps {result.num_iter:<4d}{result.dtype:9s} "
            f"{result.method:9s}{result.seconds:8.3f} s/image {spread:18s} x{pair[0].seconds / result.seconds:5.2f}"
            f"  {result.flops.total / 1e12:7.3f} TFLOPs ({parts}), {result.share_of_peak:4.0%} of peak"
            f"  VAE {result.vae_seconds:.3f} s ({vae_share:.0%}), {result.vae_flops / 1e12:.3f} TFLOPs"
            f"  {result.peak_bytes / 1e9:.1f} GB"
        )
    return "\n".join(lines)


def write(path: Path, title: str, environment: dict, results: list[Measurement]) -> None:
    rows = [{**asdict(result), "flops": result.flops._asdict()} for result in results]
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"title": title, "environment": environment, "results": rows}, indent=2) + "\n")


def read(path: Path) -> tuple[str, list[Measurement]]:
    """The title and measurements of an earlier run's `--output`. Raises InputError if it is no such file."""
    try:
        content = json.loads(path.read_text())
        return content["title"], [Measurement(**{**row, "flops": Flops(**row["flops"])}) for row in content["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--join {path} is not what --output writes ({error}): measure again") from None


def plot(results: list[Measurement], title: str, path: Path) -> None:
    """How the seconds per image grow with each setting of which several were measured, a panel for each.

    A line joins measurements that differ in the panel's setting alone.
    """
    from matplotlib.figure import Figure  # it takes a second that other runs need not wait

    axes = {"batch_size": "batch", "num_iter": "steps", "model": "model"}
    several = [name for name in [*axes, "dtype"] if len({getattr(result, name) for result in results}) > 1]
    varied = [name for name in several if name in axes] or ["model"]
    figure = Figure(figsize=(4.5 * len(varied), 3.6), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(varied), squeeze=False)[0], varied):
        lines: dict[str, list[Measurement]] = {}
        for result in sorted(results, key=lambda result: result.flops.total * result.batch_size):
            others = [f"{axes.get(name, '')} {getattr(result, name)}".strip() for name in several if name != axis]
            lines.setdefault(", ".join([*others, result.method]), []).append(result)
        longest = max(map(len, lines.values()))
        for label, line in lines.items():
            if len(line) > 1 or longest == 1:
                x = [str(getattr(result, axis)) for result in line]
                style = {"baseline": "s--", "LazyMAR": "o-"}[line[0].method]
                panel.plot(x, [result.seconds for result in line], style, label=label)
        panel.set(xlabel=axes[axis], ylabel="seconds per image", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="y", which="both", labelsize=7)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=6)
    figure.suptitle(f"Sampling on {title}", fontsize=9)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    add = partial(parser.add, nargs="+")
    add("--models", str, "models to time", default=["mar_base"], choices=PRESETS, metavar="MODEL")
    add("--methods", str, "methods to time", default=list(METHODS), choices=METHODS, metavar="METHOD")
    add("--batch_sizes", int, "batch sizes to time", default=[1], minimum=1)
    add("--num_iter", int, "numbers of autoregressive steps to time", default=[64], minimum=1)
    add("--dtypes", str, "dtypes to time", default=["auto"], choices=("auto", *DTYPES), metavar="DTYPE")
    parser.add_fields(Options, "device", "num_sampling_steps")
    parser.add("--repeats", int, "runs of each method, of which the median counts", default=3, minimum=1)
    parser.add("--profile", bool, "print, too, which operators take longest in the last method")
    parser.add("--output", Path, "write all measurements there, too (JSON)", metavar="FILE")
    parser.add("--plot", Path, "write a plot of the measurements there (.png, .svg or .pdf)", metavar="FILE")
    add("--join", Path, "measure nothing, and --plot what earlier commands wrote with --output", metavar="JSON")
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.join and not args.plot:
        raise InputError("--join draws what was measured before: give --plot, too")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot must end in .png, .svg or .pdf, not be {args.plot}")
    if args.join:
        titles, results = zip(*map(read, args.join))
        plot([result for some in results for result in some], titles[0], args.plot)
        return
    for name, num_iter in product(args.models, args.num_iter):
        check(Options(model=name, num_iter=num_iter, num_sampling_steps=args.num_sampling_steps))
    device = choose_device(args.device)
    environment, results = describe(device), []
    title = f"{processor_name(device)}, PyTorch {environment['torch']}"
    print(f"{title}; random weights; FLOPs: encoder + decoder + head")
    for dtype in dict.fromkeys(dtype_name(choose_dtype(name, device)) for name in args.dtypes):  # each once
        rate = matmul_rate(device, DTYPES[dtype])
        print(f"{dtype}: matrix products at {rate / 1e12:.2f} TFLOP/s")
        for name in args.models:
            model = random_model(name, device, DTYPES[dtype])
            for batch_size, num_iter in product(args.batch_sizes, args.num_iter):
                pair = measure(model, name, batch_size, num_iter, dtype, args, rate)
                results += pair
                print(table(pair), flush=True)
                if args.output:
                    write(args.output, title, environment, results)
    if args.plot:
        plot(results, title, args.plot)


if __name__ == "__main__":
    sys.exit(main())
