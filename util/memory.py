"""Memory: an estimate before sampling, and what to do when it runs out."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from models import MAR, Plan, Sampler
from util.errors import InputError
from util.images import IMAGES_AT_ONCE

T = TypeVar("T")


def memory(device: torch.device) -> int:
    """Return the bytes of memory to work with: on a GPU what is free or kept by PyTorch for reuse, on a CPU all."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_needed(model: MAR, plan: Plan, batch_size: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that sampling and decoding a batch takes without CUDA graphs; `model` is on the meta device.

    The caches are counted. The activations are multiples of a tensor of all rows and of the head's modulations, fitted
    to a simulation of PyTorch's allocator for MAR-B to MAR-H. With CUDA graphs it is up to a third more.
    """
    rows = plan.num_rows * model.mask_token.shape[-1]
    cached = 4 * plan.num_branches * rows  # the first decoder block's input, queries, keys and values
    if plan.policy.token_cache:
        blocks = len(model.encoder_blocks) + len(model.decoder_blocks) - plan.policy.prune_layer - 1
        cached += plan.lazy_branches * rows * (2 * blocks + 1)
    if plan.has_condition_cache:
        cached += model.seq_len * model.mask_token.shape[-1]
    head, most_tokens = model.diffloss.net, max(step.num_tokens for step in plan)
    modulations = (3 * len(head.res_blocks) + 2) * head.input_proj.out_features * plan.num_branches * most_tokens
    activations = max(21 * plan.num_branches * rows, 3 * modulations)
    decoding = min(batch_size, IMAGES_AT_ONCE) * 8 * 128 * model.img_size**2
    weights = sum(parameter.numel() for parameter in model.parameters())
    return dtype.itemsize * (weights + batch_size * (cached + activations) + decoding)


def check_memory(model: MAR, plan: Plan, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise InputError for a batch that cannot fit."""
    available, needed = memory(device), memory_needed(model, plan, batch_size, dtype)
    if needed > available:
        fits = bisect_right(range(1, batch_size), available, key=lambda size: memory_needed(model, plan, size, dtype))
        way_out = f"try --eval_bsz {fits}" if fits else "take a smaller --model"
        raise InputError(
            f"--eval_bsz {batch_size} needs about {needed / 1e9:.1f} GB and does not fit into {available / 1e9:.1f} GB "
            f"of memory: {way_out}"
        )


def retry_eagerly(sampler: Sampler, compute: Callable[..., T], *inputs: Any) -> T:
    """Return `compute(*inputs)`. If the GPU's memory runs out, free the CUDA graphs and compute once more without."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return compute(*inputs)
    print("note: out of GPU memory; this batch is made again, and all others, without CUDA graphs", flush=True)
    sampler.drop_graphs()
    torch.cuda.empty_cache()
    return compute(*inputs)


@contextlib.contextmanager
def out_of_memory_explained(batch_size: int) -> Iterator[None]:
    """Turn PyTorch's errors for lack of memory, which are many, into an `InputError` that names the ways out."""
    signs = ("out of memory", "OutOfMemory", "MemoryError", "allocate memory", "enough memory", "STATUS_ALLOC_FAILED")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not any(sign in repr(error) for sign in signs):
            raise
        raise InputError(
            f"out of memory at --eval_bsz {batch_size}: add --no-cuda_graphs, or if that is not enough give --eval_bsz "
            f"{max(1, batch_size // 2)}; either continues in the same folder"
        ) from error
