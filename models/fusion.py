"""Elementwise work as one kernel where `torch.compile` can make one, and as it stands where it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

VARIANTS = 64  # of a function that are compiled: for None, for one row, for each number format, not for each size


class Fused:
    """A function that depends on its arguments alone, compiled at its first calls for tensors of any size."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        torch._dynamo.config.cache_size_limit = max(VARIANTS, torch._dynamo.config.cache_size_limit)
        self.compiled: Callable[..., Tensor] | None = torch.compile(function, dynamic=True)

    def __call__(self, *args) -> Tensor:
        if self.compiled is not None:
            try:
                return self.compiled(*args)
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"{self.function.__name__} is not compiled, because that failed: {reason}", stacklevel=2)
                self.compiled = None
        return self.function(*args)
