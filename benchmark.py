"""Time sampling by method, model, batch size, steps and dtype; no weights are needed.

    python benchmark.py --models mar_base --batch_sizes 1 8 --dtypes float32 bfloat16
    python benchmark.py --models mar_huge --batch_sizes 1 128 --dtypes bfloat16 --device cuda --plot speed.png
    python benchmark.py --models mar_huge --method mar lazymar lazymar+disa

Speed does not depend on the weights, so they are random. The methods take turns, and each figure is the median of
`--repeats` runs; the machine's own rate of matmuls is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path

import torch
from tqdm import tqdm

from models import MAR, PRESETS, AutoencoderKL, Method, Sampler, count_flops, create_model
from models.lazymar.flops import Flops, count_decoding_flops
from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write, check_writable
from util.machine import DTYPES, choose_device, choose_dtype, describe, dtype_name, processor_name
from util.reproduction.timing import (
    cpu_peak,
    gpu_peak,
    matmul_rate,
    profiled,
    time_sampling,
    timed,
)
from util.runs.images import decode
from util.runs.methods import add_steps, find_methods, with_steps
from util.runs.options import Options, check
from util.weights.models import random_model

STYLES = ("s--", "o-", "^-.", "D:", "v--", "P-", "X-.", "*:")


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    device = choose_device(args.device)
    environment, results = describe(device), []
    title = f"{processor_name(device)}, PyTorch {environment['torch']}"
    print(f"{title}; random weights; FLOPs: encoder + decoder + head")
    for dtype in dict.fromkeys(dtype_name(choose_dtype(name, device)) for name in args.dtypes):  # each once
        rate = matmul_rate(device, DTYPES[dtype])
        print(f"{dtype}: matmuls at {rate / 1e12:.2f} TFLOP/s")
        for name in args.models:
            model, vae = random_model(name, device, DTYPES[dtype])
            for batch_size, num_iter in product(args.batch_sizes, args.num_iter):
                measured = measure(Setting(name, batch_size, num_iter, dtype), model, vae, args, rate)
                results += measured
                print(table(measured), flush=True)
                if args.output:
                    write(args.output, title, environment, results)
    if args.plot:
        plot(results, title, args.plot)


@dataclass(frozen=True)
class Setting:
    """One combination of flags; each method is measured in it."""

    model: str
    batch_size: int
    num_iter: int
    dtype: str


@dataclass(frozen=True)
class Measurement(Setting):
    """A method's measurement in a setting. Seconds and FLOPs are per image.

    num_iter:                  the method's own, if it has stages.
    seconds, fastest, slowest: of sampling; the first is the median run's.
    share_of_peak:             rate of sampling, relative to the measured rate of matmuls.
    peak_bytes:                of memory, see `gpu_peak` and `cpu_peak`.
    """

    method: str
    seconds: float
    fastest: float
    slowest: float
    vae_seconds: float
    flops: Flops
    vae_flops: int
    share_of_peak: float
    peak_bytes: int


@torch.inference_mode()
def measure(
    setting: Setting, model: MAR, vae: AutoencoderKL, args: argparse.Namespace, rate: float
) -> list[Measurement]:
    """Time the methods in turn, and the VAE. `rate` is the machine's rate of matmuls, in FLOP/s."""
    preset = PRESETS[setting.model]
    methods = {
        name: with_steps(method, setting.num_iter, args.num_sampling_steps) for name, method in args.method.items()
    }
    samplers = {name: Sampler(model, method, cfg=preset.cfg) for name, method in methods.items()}
    seconds, peaks = time_in_turn(samplers, setting, args)
    with torch.device("meta"):
        network, vae_network = create_model(setting.model), AutoencoderKL(**preset.vae)
    side = network.grid_size * network.patch_size
    vae_flops, vae_seconds = count_decoding_flops(vae_network, side), time_decoding(setting, model, vae)
    results = []
    for name, times in seconds.items():
        flops, median = count_flops(network, methods[name], cfg=preset.cfg), statistics.median(times)
        results.append(
            Measurement(
                **{**asdict(setting), "num_iter": len(samplers[name].plan)},
                method=name,
                seconds=median,
                fastest=min(times),
                slowest=max(times),
                vae_seconds=vae_seconds,
                flops=flops,
                vae_flops=vae_flops,
                share_of_peak=flops.total / median / rate,
                peak_bytes=peaks[name],
            )
        )
    return results


def time_in_turn(
    samplers: dict[str, Sampler], setting: Setting, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per image of each run, and bytes of memory at the most, by method."""
    device, peaks = next(iter(samplers.values())).device, {}
    seconds: dict[str, list[float]] = {method: [] for method in samplers}
    title = f"{setting.model}, batch {setting.batch_size}, {setting.dtype}"
    with tqdm(total=len(samplers) * (1 + args.repeats), desc=title, leave=False) as progress:
        for method, sampler in samplers.items():
            start = partial(sampler.warm_up, setting.batch_size)
            if device.type == "cuda":
                weights = sum(parameter.nbytes for parameter in sampler.model.parameters())
                peaks[method] = weights + gpu_peak(start, device)
            else:
                start()
            progress.update()
        for _ in range(args.repeats):
            for method, sampler in samplers.items():
                seconds[method].append(time_sampling(sampler, setting.batch_size).seconds / setting.batch_size)
                if device.type == "cpu":
                    peaks[method] = cpu_peak()
                progress.update()
    if args.profile:
        print(profiled(partial(time_sampling, samplers[list(samplers)[-1]], setting.batch_size), device))
    return seconds, peaks


def time_decoding(setting: Setting, model: MAR, vae: AutoencoderKL) -> float:
    """Seconds per image that the VAE takes."""
    device, side = model.mask_token.device, model.grid_size * model.patch_size
    latents = torch.randn(setting.batch_size, model.vae_embed_dim, side, side, device=device)
    return min(timed(lambda: decode(vae, latents), device) for _ in range(2)) / setting.batch_size


def table(measured: list[Measurement]) -> str:
    """A line per method; the FLOP counts are the encoder's, the decoder's, the head's and, apart, the VAE's."""
    lines, width = [], 1 + max(len(result.method) for result in measured)
    for result in measured:
        spread = f"({result.fastest:.3f} to {result.slowest:.3f})"
        parts = " + ".join(f"{part / 1e12:.3f}" for part in result.flops)
        speed_up = measured[0].seconds / result.seconds
        vae_share = result.vae_seconds / (result.seconds + result.vae_seconds)
        lines.append(
            f"{result.model:10s} batch {result.batch_size:<4d}steps {result.num_iter:<4d}{result.dtype:9s} "
            f"{result.method:{width}s}{result.seconds:8.3f} s/image {spread:18s} x{speed_up:5.2f}"
            f"  {result.flops.total / 1e12:7.3f} TFLOPs ({parts}), {result.share_of_peak:4.0%} of peak"
            f"  VAE {result.vae_seconds:.3f} s ({vae_share:.0%}), {result.vae_flops / 1e12:.3f} TFLOPs"
            f"  {result.peak_bytes / 1e9:.1f} GB"
        )
    return "\n".join(lines)


def write(path: Path, title: str, environment: dict[str, str], results: list[Measurement]) -> None:
    """Write all that was measured as JSON."""
    rows = [{**asdict(result), "flops": result.flops._asdict()} for result in results]
    with atomic_write(path) as partial_file:
        partial_file.write_text(
            json.dumps({"title": title, "environment": environment, "results": rows}, indent=2) + "\n"
        )


def plot(results: list[Measurement], title: str, path: Path) -> None:
    """Plot how the seconds per image grow with each setting of which several were measured, a panel for each.

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
        for (label, line), style in zip(lines.items(), cycle(STYLES)):
            if len(line) > 1 or longest == 1:
                x = [str(getattr(result, axis)) for result in line]
                panel.plot(x, [result.seconds for result in line], style, label=label)
        panel.set(xlabel=axes[axis], ylabel="seconds per image", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="y", which="both", labelsize=7)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=6)
    figure.suptitle(f"Sampling on {title}", fontsize=9)
    with atomic_write(path) as partial_file:
        figure.savefig(partial_file, format=path.suffix[1:], dpi=150)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    add = partial(parser.add, nargs="+")
    add("--models", str, "models to time", default=["mar_base"], choices=PRESETS, metavar="MODEL")
    add("--method", method_name, "methods to time, see eval.py", default=["mar", "lazymar"], metavar="NAME",
        alias="--methods")  # fmt: skip
    add("--batch_sizes", int, "batch sizes to time", default=[1], minimum=1)
    add("--dtypes", str, "dtypes to time", default=["auto"], choices=("auto", *DTYPES), metavar="DTYPE")
    add_steps(parser, nargs="+", default=[Method().num_iter])
    parser.add_fields(Options, "device")
    parser.add("--repeats", int, "runs of each method, of which the median counts", default=3, minimum=1)
    parser.add("--profile", bool, "print, too, which operators take longest in the last method")
    parser.add("--output", Path, "write all measurements there, too (JSON)", metavar="FILE")
    parser.add("--plot", Path, "write a plot of the measurements there (.png, .svg or .pdf)", metavar="FILE")
    args = parser.parse_args(argv)
    args.method = find_methods(args.method)
    return args


def method_name(text: str) -> str:
    """Read the name of a method, also one by which earlier versions called it."""
    return "mar" if text.lower() == "baseline" else text.lower()


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError, naming the flag, for a value that is out of range for a model."""
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot must end in .png, .svg or .pdf, not be {args.plot}")
    for path in filter(None, (args.output, args.plot)):
        check_writable(path)
    for name, num_iter, method in product(args.models, args.num_iter, args.method.values()):
        check(Options(model=name, method=with_steps(method, num_iter, args.num_sampling_steps)))


if __name__ == "__main__":
    sys.exit(main())
