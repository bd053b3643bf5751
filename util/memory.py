"""What to do when memory runs out."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from models import Sampler
from util.errors import InputError

T = TypeVar("T")


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
