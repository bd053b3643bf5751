"""Time sampling, baseline against LazyMAR, by model, batch size and number format; no weights are needed.

    python benchmark.py --models mar_base --batch_sizes 1 8 --dtypes float32 bfloat16
    python benchmark.py --models mar_huge --batch_sizes 1 128 --dtypes bfloat16 --device cuda

Speed does not depend on the weights, so they are random. The two methods take turns, and each figure is the median of
`--repeats` runs; the machine's own rate of matrix products is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from models import MAR, PRESETS, AutoencoderKL, CachePolicy, ImageNoise, cast_model, count_flops, create_model
from models.flops import Flops
from models.sampling import sample_tokens
from util.environment import DTYPES, choose_device, describe
from util.errors import InputError, exits_cleanly
from util.files import atomic_write
from util.threads import map_images

METHODS = {"baseline": None, "LazyMAR": CachePolicy()}


@dataclass
class Measurement:
    """One method in one setting. Seconds are per image; FLOPs of one image, without the VAE."""

    model: str
    batch_size: int
    dtype: str
    method: str
    seconds: float
    fastest: float
    slowest: float
    vae_seconds: float
    flops: Flops
    share_of_peak: float
    peak_bytes: int


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large square matrix products, the best of a few."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = min(timed(lambda: a @ b, device) for _ in range(8))
    return 2 * size**3 / seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: on a GPU since the last reset, on a CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.inference_mode()
def measure(
    model: MAR, name: str, batch_size: int, dtype: str, args: argparse.Namespace, device: torch.device, rate: float
) -> list[Measurement]:
    """Both methods on one model, in turn."""
    cfg, labels = PRESETS[name].cfg, torch.arange(batch_size) % model.class_num
    noise = ImageNoise(model, 0, range(batch_size), args.num_sampling_steps, device)
    settings = {"num_iter": args.num_iter, "cfg": cfg, "num_sampling_steps": args.num_sampling_steps, "noise": noise}
    seconds, peaks = {method: [] for method in METHODS}, {}
    for _ in tqdm(range(args.repeats), desc=f"{name}, batch {batch_size}, {dtype}", leave=False):
        for method, cache in METHODS.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            elapsed = timed(lambda cache=cache: sample_tokens(model, labels, cache=cache, **settings), device)
            seconds[method].append(elapsed / batch_size)
            peaks[method] = peak_bytes(device)

    vae = AutoencoderKL(**PRESETS[name].vae).to(device).eval()
    side = model.grid_size * model.patch_size
    latents = torch.randn(batch_size, model.vae_embed_dim, side, side, device=device)
    decode = torch.inference_mode()(vae.decode)  # the mode does not extend to other threads by itself
    vae_seconds = timed(lambda: map_images(decode, latents), device) / batch_size

    with torch.device("meta"):
        shapes = create_model(name)
    results = []
    for method, cache in METHODS.items():
        flops = count_flops(
            shapes, num_iter=args.num_iter, cfg=cfg, num_sampling_steps=args.num_sampling_steps, cache=cache
        )
        median = statistics.median(seconds[method])
        results.append(
            Measurement(
                model=name,
                batch_size=batch_size,
                dtype=dtype,
                method=method,
                seconds=median,
                fastest=min(seconds[method]),
                slowest=max(seconds[method]),
                vae_seconds=vae_seconds,
                flops=flops,
                share_of_peak=flops.total / median / rate,
                peak_bytes=peaks[method],
            )
        )
    return results


def table(pair: list[Measurement]) -> str:
    """A line per method; the three FLOP counts are the encoder's, the decoder's and the head's."""
    lines = []
    for result in pair:
        spread = f"({result.fastest:.3f} to {result.slowest:.3f})"
        parts = ", ".join(f"{part / 1e12:.3f}" for part in result.flops)
        lines.append(
            f"{result.model:10s} batch {result.batch_size:<4d}{result.dtype:9s} {result.method:9s}"
            f"{result.seconds:9.3f} s/image {spread:20s} x{pair[0].seconds / result.seconds:5.2f}"
            f"  {result.flops.total / 1e12:7.3f} TFLOPs ({parts}), {result.share_of_peak:4.0%} of peak"
            f"  VAE {result.vae_seconds:.3f} s  {result.peak_bytes / 1e9:.1f} GB"
        )
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mar_base"], choices=list(PRESETS), metavar="MODEL")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each method")
    parser.add_argument("--num_iter", type=int, default=64)
    parser.add_argument("--num_sampling_steps", type=int, default=100)
    parser.add_argument("--output", type=Path, help="write everything there too (JSON)")
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for flag in ("batch_sizes", "repeats", "num_iter", "num_sampling_steps"):
        value = getattr(args, flag)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise InputError(f"--{flag} must be at least 1, not {value}")
    device = choose_device(args.device)
    environment, results = describe(device), []
    print(
        f"{environment['processor']}, torch {environment['torch']}; random weights; FLOPs as encoder + decoder + head"
    )
    for dtype in args.dtypes:
        rate = matmul_rate(device, DTYPES[dtype])
        print(f"{dtype}: matrix products at {rate / 1e12:.2f} TFLOP/s")
        for name in args.models:
            model = cast_model(create_model(name), DTYPES[dtype]).to(device)
            for batch_size in args.batch_sizes:
                try:
                    pair = measure(model, name, batch_size, dtype, args, device, rate)
                except ValueError as error:
                    raise InputError(f"--{error}") from None
                results += pair
                print(table(pair), flush=True)
    if args.output:
        rows = [{**asdict(result), "flops": result.flops._asdict()} for result in results]
        with atomic_write(args.output) as partial:
            partial.write_text(json.dumps({"environment": environment, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
