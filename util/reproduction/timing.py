"""Times sampling, in full or from its first steps, and measures a device's rate of matmuls and its memory."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from models import Sampler
from models.lazymar.flops import Flops
from util.runs.options import labels_of_images

SLOW_MATMUL_SECONDS = 0.1  # no larger ones are timed then


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, with all the work that it gives to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# Sampling


@dataclass(frozen=True)
class Latency:
    """Seconds that a batch takes to sample, without decoding.

    `timed_steps` of `num_iter` steps were timed, and the others are estimated by their FLOPs.
    """

    seconds: float
    timed_steps: int
    num_iter: int

    @property
    def how(self) -> str:
        if self.timed_steps == self.num_iter:
            return "timed in full"
        return f"extrapolated by FLOPs from the first {self.timed_steps} of {self.num_iter} steps"


def time_sampling(
    sampler: Sampler, batch_size: int, flops_per_step: Sequence[Flops] = (), limit: float = math.inf
) -> Latency:
    """Time a batch of images 0, 1, ... of classes 0, 1, ..., after `Sampler.warm_up`.

    On a CPU it is ended after the step in which `limit` seconds are over, and the others are estimated by
    `flops_per_step`; a GPU is not interrupted.
    """
    labels = torch.tensor(labels_of_images(range(batch_size), sampler.model.class_num))
    done = 0

    def batch() -> None:
        nonlocal done
        start = time.perf_counter()
        for _ in sampler.steps(labels, None, sampler.empty_latents(batch_size)):
            done += 1
            if sampler.device.type == "cpu" and time.perf_counter() - start > limit:
                return

    seconds = timed(batch, sampler.device)
    flops = [step.total for step in flops_per_step]
    if 0 < done < len(flops):
        seconds *= sum(flops) / sum(flops[:done])
    return Latency(seconds, done, len(sampler.plan))


# The device


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large square matmuls, the best of a few: of smaller ones where the dtype makes these slow."""
    size, largest = 256, 8192 if device.type == "cuda" else 2048
    while True:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = min(timed(partial(torch.matmul, a, b), device) for _ in range(8))
        if size == largest or seconds > SLOW_MATMUL_SECONDS:
            return 2 * size**3 / seconds
        size *= 2


def gpu_peak(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch takes during a call, beyond those that it had taken before.

    Taken, not in use: captured graphs keep theirs, and a replay is not seen to use any.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    timed(run, device)
    return torch.cuda.max_memory_reserved(device) - before


def cpu_peak() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def profiled(run: Callable[[], object], device: torch.device) -> str:
    """A table of the operators that take longest during a call."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        timed(run, device)
    return profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=15)
