"""How long sampling takes, from one batch or from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from models import MAR, CachePolicy, ImageNoise, Sampler, cast_model, create_model, pack_linear_layers
from models.lazymar.flops import Flops

GPU_BATCHES = 3  # the first one loads kernels, the second records graphs, the third is timed


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, with all the work that it gives to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> MAR:
    """A model with random weights, on which speed does not depend, as ready for sampling as a loaded one."""
    return pack_linear_layers(cast_model(create_model(name), dtype).to(device))


@dataclass(frozen=True)
class Latency:
    """Seconds that a batch takes to sample, without decoding; `timed_steps` of `num_iter` steps were timed, and the
    rest estimated by its operations."""

    seconds: float
    timed_steps: int
    num_iter: int

    @property
    def how(self) -> str:
        if self.timed_steps == self.num_iter:
            return "timed in full"
        return f"extrapolated by operations from the first {self.timed_steps} of {self.num_iter} steps"


def time_sampling(
    model: MAR,
    batch_size: int,
    flops: Sequence[Flops],
    *,
    num_iter: int,
    cfg: float,
    num_sampling_steps: int,
    cache: CachePolicy | None,
    seconds: float,
) -> Latency:
    """Time one batch, but no longer than about so many `seconds` on a CPU. `flops` are those of each step."""
    device = model.mask_token.device
    sampler = Sampler(model, num_iter=num_iter, cfg=cfg, num_sampling_steps=num_sampling_steps, cache=cache)
    labels = torch.arange(batch_size) % model.class_num
    noise = ImageNoise(model, 0, range(batch_size), num_sampling_steps, device)
    if device.type == "cuda":
        elapsed = [timed(lambda: sampler(labels, noise), device) for _ in range(GPU_BATCHES)]
        return Latency(elapsed[-1], num_iter, num_iter)
    side = model.grid_size * model.patch_size
    latents = torch.empty(batch_size, model.vae_embed_dim, side, side, dtype=sampler.dtype)
    next(sampler.steps(labels, noise, latents))  # packs the weights, which a run does once
    start, done = time.perf_counter(), 0
    for _ in sampler.steps(labels, noise, latents):
        done, elapsed = done + 1, time.perf_counter() - start
        if elapsed > seconds:
            break
    operations = [step.total for step in flops]
    return Latency(elapsed * sum(operations) / sum(operations[:done]), done, num_iter)
