"""Memory: a check before sampling whether a batch can fit, and an explanation if it did not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from models import MAR
from models.lazymar.plan import Plan
from models.lazymar.transformer import Transformer
from util.errors import InputError


def memory(device: torch.device) -> int:
    """Bytes of memory to work with: on a GPU those that are free or that PyTorch keeps for reuse, on a CPU all."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_needed(model: MAR, plan: Plan, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that sampling needs at least: those of the weights, and those of each image of a batch.

    An image needs its caches, the first decoder block's rows and, at a refresh, the activations of one block. `model`
    is on the meta device.
    """
    rows = plan.num_branches * plan.num_rows * model.mask_token.shape[-1]  # numbers in a tensor of all rows
    first_block, activations = 4 * rows, 8 * rows
    weights = sum(parameter.numel() for parameter in model.parameters())
    return weights * dtype.itemsize, (cached_numbers(model, plan) + first_block + activations) * dtype.itemsize


def cached_numbers(model: MAR, plan: Plan) -> int:
    """Return how many numbers an image keeps from one step to the next: those of its token and condition cache.

    `model` is on the meta device.
    """
    transformer = Transformer(model, plan, 1)
    tensors = [*transformer.token_cache.tensors, *transformer.condition_cache.tensors]
    return sum(tensor.numel() for tensor in tensors)


def check_memory(model: MAR, plan: Plan, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a batch that cannot fit, by the lower bound of `memory_needed`."""
    weights, per_image = memory_needed(model, plan, dtype)
    left = memory(device) - weights
    if batch_size * per_image > left:
        fits = max(0, left) // per_image // 2
        way_out = f"try --eval_bsz {fits}" if fits else "take a smaller --model"
        raise InputError(
            f"--eval_bsz {batch_size} does not fit into {memory(device) / 1e9:.1f} GB of memory: {way_out}"
        )


@contextlib.contextmanager
def out_of_memory_explained(batch_size: int) -> Iterator[None]:
    """Turn PyTorch's errors for lack of memory, which are many, into an `InputError` that names a batch size to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in signs):
            raise
        raise InputError(
            f"out of memory at --eval_bsz {batch_size}: try --eval_bsz {max(1, batch_size // 2)}, and another "
            "--output_dir if this one holds finished batches"
        ) from error
