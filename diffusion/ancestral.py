"""The ancestral step of improved DDPM (arXiv 2102.09672), with the learned variance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def denoise(
    x: Tensor,
    eps: Tensor,
    v: Tensor,
    difference: Tensor | None,
    guidance: Tensor,
    coefficients: Sequence[Tensor],
    noise: Tensor | None,
    temperature: float,
) -> Tensor:
    """Take one ancestral step with the learned variance; return the less noisy tokens [n, C].

    Args:
        x:            [n, C] the noisy tokens.
        eps, v:       [n, C] predicted noise and variance of the conditional branch.
        difference:   [n, C] conditional - unconditional eps; None without guidance.
        guidance:     [] the CFG scale - 1.
        coefficients: [] each, of x and eps, then base and slope of the noise's log standard deviation.
        noise:        [n, C]; None at the last step.
    """
    x_coefficient, eps_coefficient, log_std_base, log_std_slope = coefficients
    if difference is not None:
        eps = torch.addcmul(eps, difference, guidance)
    mean = torch.addcmul(x_coefficient * x, eps_coefficient, eps)
    if noise is None:
        return mean
    std = torch.addcmul(log_std_base, log_std_slope, v).exp()
    return torch.addcmul(mean, std, noise, value=temperature)
