"""Time sampling by method, model, batch size, steps and dtype; no weights are needed.

    python benchmark.py --models mar_base --batch_sizes 1 8 --dtypes float32 bfloat16
    python benchmark.py --models mar_huge --batch_sizes 1 128 --dtypes bfloat16 --device cuda

Speed does not depend on the weights, so they are random. The methods take turns, and each figure is the median of
`--repeats` runs; the machine's own rate of matmuls is measured in the same run.
"""

import argparse
import json
import sys
import time
from argparse import BooleanOptionalAction
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from models import MAR, PRESETS, Plan, Sampler
from util.cli import Parser, number
from util.errors import exits_cleanly
from util.files import atomic_write, check_writable
from util.machine import DTYPES, choose_device, choose_dtype, describe, dtype_name, processor_name
from util.options import parse_options
from util.study import method_flags
from util.weights import random_model

LINE = (
    "{model:10s} batch {batch_size:<4d}steps {num_iter:<4d}{dtype:9s} {method:16s} {seconds:8.3f} s/image "
    "({fastest:.3f} to {slowest:.3f})  x{times_faster:5.2f}  {tflops:7.3f} TFLOPs"
)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = {}
    for model, num_iter, method in product(args.models, args.num_iter, args.method):
        flags = [f"--model={model}", "--no-score", *method_flags(method, num_iter, args.num_sampling_steps)]
        options[model, num_iter, method] = parse_options(flags)
    device = choose_device(args.device)
    results: list[dict[str, Any]] = []
    print(f"{processor_name(device)}, PyTorch {torch.__version__}; random weights; the VAE is not timed")
    for dtype, model in product(dict.fromkeys(choose_dtype(name, device) for name in args.dtypes), args.models):
        rate = matmul_rate(device, dtype)
        print(f"{dtype_name(dtype)}: matmuls at {rate / 1e12:.2f} TFLOP/s", flush=True)
        network, _ = random_model(model, device, dtype)
        for batch_size, num_iter in product(args.batch_sizes, args.num_iter):
            setting = {"model": model, "batch_size": batch_size, "dtype": dtype_name(dtype), "matmul_rate": rate}
            plans = {method: options[model, num_iter, method].plan for method in args.method}
            seconds = measure(network, plans, batch_size, args)
            if device.type == "cuda":
                setting["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
                print(f"{setting['reserved_gb']:.1f} GB of the GPU's memory reserved at most so far")
            for method, times in seconds.items():
                row = {
                    **setting,
                    "method": method,
                    "num_iter": len(plans[method]),
                    "seconds": median(times),
                    "fastest": min(times),
                    "slowest": max(times),
                    "times_faster": median(seconds[args.method[0]]) / median(times),
                    "tflops": options[model, num_iter, method].flops.total / 1e12,
                }
                print(LINE.format(**row), flush=True)
                results.append(row)
            if args.output:
                with atomic_write(args.output) as partial_file:
                    content = {"environment": describe(device), "results": results}
                    partial_file.write_text(json.dumps(content, indent=2) + "\n")


def measure(model: MAR, plans: Mapping[str, Plan], batch_size: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds per image of each run, by method; the methods take turns."""
    labels, device = torch.arange(batch_size) % model.class_num, model.mask_token.device
    samplers = {name: Sampler(model, plan, cuda_graphs=args.cuda_graphs) for name, plan in plans.items()}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for sampler in samplers.values():
        sampler.warm_up(batch_size)
    for name, sampler in tqdm(list(samplers.items()) * args.repeats, leave=False):
        seconds[name].append(timed(partial(sampler, labels), device) / batch_size)
    return seconds


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


# fmt: off
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [flags]")
    add = parser.add_argument
    several = partial(add, nargs="+")
    several("--models", choices=PRESETS, default=["mar_base"], metavar="MODEL", help="models to time")
    several("--method", type=str.lower, default=["mar", "lazymar"], metavar="NAME", help="methods, see eval.py")
    several("--batch_sizes", type=number(int, 1), default=[1], metavar="N", help="images sampled together")
    several("--dtypes", choices=("auto", *DTYPES), default=["auto"], metavar="DTYPE", help="of weights and activations")
    several("--num_iter", type=number(int, 1), default=[64], metavar="N", help="steps where a method sets none")
    add("--num_sampling_steps", type=number(int, 1), default=100, metavar="N", help="denoising steps, likewise")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--cuda_graphs", action=BooleanOptionalAction, default=True, help="on GPUs, replay captured CUDA graphs")
    add("--repeats", type=number(int, 1), default=3, metavar="N", help="runs of each method; the median counts")
    add("--output", type=Path, metavar="FILE", help="write all measurements there (JSON)")
    args = parser.parse_args(argv)
    if args.output:
        check_writable(args.output)
    return args
# fmt: on


if __name__ == "__main__":
    sys.exit(main())
