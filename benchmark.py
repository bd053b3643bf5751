"""Time sampling by method, model, batch size, steps and dtype; no weights are needed.

    python benchmark.py --models mar_base --batch_sizes 1 8 --dtypes float32 bfloat16
    python benchmark.py --models mar_huge --batch_sizes 1 128 --dtypes bfloat16 --device cuda
    python benchmark.py --models mar_huge --method mar lazymar lazymar+disa

Speed does not depend on the weights, so they are random. The methods take turns, and each figure is the median of
`--repeats` runs; the machine's own rate of matmuls is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from argparse import BooleanOptionalAction
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import profile
from tqdm import tqdm

from models import MAR, PRESETS, AutoencoderKL, Sampler
from models.lazymar.flops import Flops
from util.cli import Parser, number
from util.errors import exits_cleanly
from util.files import atomic_write
from util.images import decode
from util.machine import DTYPES, choose_device, choose_dtype, describe, dtype_name, processor_name
from util.options import Options, parse_options
from util.study import method_flags
from util.weights import random_model

Row = dict[str, Any]  # a method's measurement, as `--output` writes it
LINE = (
    "{model:10s} batch {batch_size:<4d}steps {num_iter:<4d}{dtype:9s} {method:16s} {seconds:8.3f} s/image "
    "({fastest:.3f} to {slowest:.3f})  x{times_faster:5.2f}  {tflops[total]:7.3f} TFLOPs ({tflops[encoder]:.3f} + "
    "{tflops[decoder]:.3f} + {tflops[head]:.3f}), {share_of_peak:4.0%} of peak"
    "  VAE {vae_seconds:.3f} s  {peak_gb:.1f} GB"
)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    methods: dict[tuple[str, int], dict[str, Options]] = defaultdict(dict)
    for model, num_iter, name in product(args.models, args.num_iter, args.method):
        flags = [f"--model={model}", "--no-score", *method_flags(name, num_iter, args.num_sampling_steps)]
        methods[model, num_iter][name] = parse_options(flags)
    device = choose_device(args.device)
    environment, results = describe(device), list[Row]()
    title = f"{processor_name(device)}, PyTorch {environment['torch']}"
    print(f"{title}; random weights; TFLOPs of encoder + decoder + head")
    for dtype, name in product(dict.fromkeys(choose_dtype(name, device) for name in args.dtypes), args.models):
        rate = matmul_rate(device, dtype)
        print(f"{dtype_name(dtype)}: matmuls at {rate / 1e12:.2f} TFLOP/s", flush=True)
        networks = random_model(name, device, dtype)
        for batch_size, num_iter in product(args.batch_sizes, args.num_iter):
            setting = {"model": name, "batch_size": batch_size, "dtype": dtype_name(dtype), "matmul_rate": rate}
            rows = [{**setting, **row} for row in measure(*networks, methods[name, num_iter], batch_size, rate, args)]
            print("\n".join(LINE.format(**row) for row in rows), flush=True)
            results += rows
            if args.output:
                content = {"title": title, "environment": environment, "results": results}
                with atomic_write(args.output) as partial_file:
                    partial_file.write_text(json.dumps(content, indent=2) + "\n")


@torch.inference_mode()
def measure(
    model: MAR, vae: AutoencoderKL, methods: dict[str, Options], batch_size: int, rate: float, args: argparse.Namespace
) -> Iterator[Row]:
    """Time the methods in turns, and the VAE. Seconds and FLOPs are per image, those of the methods without the VAE.

    `times_faster` than the first method; `peak_gb` of the process so far: to see what a method takes, time it alone.
    """
    labels, device = torch.arange(batch_size) % model.class_num, model.mask_token.device
    samplers = {name: Sampler(model, options.plan, cuda_graphs=args.cuda_graphs) for name, options in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for sampler in samplers.values():
        sampler.warm_up(batch_size)
    for name, sampler in tqdm(list(samplers.items()) * args.repeats, leave=False):
        seconds[name].append(timed(partial(sampler, labels), device) / batch_size)
    if args.profile:
        with profile() as profiler:
            timed(partial(sampler, labels), device)
        print(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=15))
    latents = sampler.empty_latents(batch_size).normal_()
    vae_seconds = min(timed(partial(decode, vae, latents), device) for _ in range(2)) / batch_size
    first = median(seconds[next(iter(seconds))])
    for name, times in seconds.items():
        flops = Flops.of_steps(methods[name].flops)
        yield {
            "method": name,
            "num_iter": len(samplers[name].plan),
            "seconds": median(times),
            "fastest": min(times),
            "slowest": max(times),
            "times_faster": first / median(times),
            "vae_seconds": vae_seconds,
            "tflops": {part: count / 1e12 for part, count in {"total": flops.total, **flops._asdict()}.items()},
            "share_of_peak": flops.total / median(times) / rate,
            "peak_gb": peak_memory(device) / 1e9,
        }


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, with all the work that it queues on the device."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of large square matmuls, the best of a few; the sizes grow while they are fast."""
    size, largest, seconds = 128, 8192 if device.type == "cuda" else 1024, 0.0
    while size < largest and seconds < 0.1:
        size *= 2
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = min(timed(partial(torch.matmul, a, b), device) for _ in range(8))
    return 2 * size**3 / seconds


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had so far: on a GPU what PyTorch reserved, on a CPU in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# fmt: off
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    add = parser.add_argument
    several = partial(add, nargs="+")
    several("--models", choices=PRESETS, default=["mar_base"], metavar="MODEL", help="models to time")
    several("--method", type=str.lower, default=["mar", "lazymar"], metavar="NAME", help="methods, see eval.py")
    several("--batch_sizes", type=number(int, 1), default=[1], metavar="N", help="images sampled together")
    several("--dtypes", choices=("auto", *DTYPES), default=["auto"], metavar="DTYPE", help="of weights and activations")
    several("--num_iter", type=number(int, 1), default=[64], metavar="N", help="autoregressive steps, without stages")
    add("--num_sampling_steps", type=number(int, 1), default=100, metavar="N", help="denoising steps, not annealed")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--cuda_graphs", action=BooleanOptionalAction, default=True, help="on GPUs, replay captured CUDA graphs")
    add("--repeats", type=number(int, 1), default=3, metavar="N", help="runs of each method; the median counts")
    add("--profile", action="store_true", help="also print which operators take longest in the last method")
    add("--output", type=Path, metavar="FILE", help="write all measurements there (JSON)")
    return parser.parse_args(argv)
# fmt: on


if __name__ == "__main__":
    sys.exit(main())
