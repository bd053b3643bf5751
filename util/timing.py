"""Timing of a device's work, its matmul rate, and its peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

SLOW_MATMUL_SECONDS = 0.1  # no larger matmul is timed then


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, with all the work that it queues on the device."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of large square matmuls, the best of a few; takes about two seconds."""
    size, largest = 256, 8192 if device.type == "cuda" else 1024
    while True:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = min(timed(partial(torch.matmul, a, b), device) for _ in range(8))
        if size == largest or seconds > SLOW_MATMUL_SECONDS:
            return 2 * size**3 / seconds
        size *= 2


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had so far: on a GPU what PyTorch reserved, on a CPU in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
