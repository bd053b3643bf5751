"""Muon: an optimizer for a transformer's weight matrices, whose every step is an orthogonalised momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The Newton-Schulz iteration with the coefficients of Jordan et al.: five rounds bring all but the smallest singular
# values to between 0.7 and 1.2, which trains as well as 1.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximate the nearest matrix with orthonormal rows or columns to a matrix [m, n]: its singular values become 1.

    The result is U V^T, roughly, where the matrix is U S V^T; it has the matrix's dtype.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, b * gram + c * (gram @ gram), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Takes steps of the same size in all directions of a matrix (Jordan et al., 2024; scaled as in arXiv 2502.16982).

    A matrix [3 D, D] is taken for the queries', keys' and values' weights in one, and each third is orthogonalised by
    itself. An entry's step is about 0.2 `lr`, as AdamW's is, so that both optimizers can share a learning rate.
    PyTorch 2.9 and later have a Muon, too, which computes in bfloat16; most CPUs only emulate that.

    Args:
        params:       matrices [m, n], or groups of them.
        lr:           learning rate.
        weight_decay: share of `lr` by which the weights shrink in each step.
        momentum:     share of the running average of gradients that is kept in each step.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Change all matrices that have a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                average = state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(average, group["momentum"])  # Nesterov momentum
                rows, columns = matrix.shape
                parts = ahead.chunk(3) if rows == 3 * columns else [ahead]
                scale = 0.2 * max(parts[0].shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(torch.cat([orthogonalize(part) for part in parts]), alpha=-group["lr"] * scale)
