"""The training loss of the diffusion head (improved DDPM's hybrid loss)."""

from __future__ import annotations

import math
from typing import Callable

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class HybridLoss:
    """Noise-prediction MSE plus the variational bound, which alone trains the learned variance.

    The bound's gradient does not reach the predicted noise. It is in bits per channel; at t = 0, where the true
    posterior is a point, it is the negative log likelihood of the token itself.
    """

    def __init__(self, device: torch.device) -> None:
        schedule = NoiseSchedule.create()
        names = ("x_coefficient", "eps_coefficient", "log_betas", "log_posterior_variances", "alpha_bars")
        rows = [torch.as_tensor(getattr(schedule, name), dtype=torch.float32, device=device) for name in names]
        self.table = torch.stack(rows, dim=1)  # [1000, 5]

    def __call__(
        self, head: Head, tokens: Tensor, conditions: Tensor, timesteps: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared error [N] and bound [N] of `tokens` [N, C] noised with `noise`, under `conditions` [N, D]."""
        x_coef, eps_coef, log_beta, log_posterior, alpha_bar = self.table[timesteps].split(1, dim=1)
        noisy = alpha_bar.sqrt() * tokens + (1 - alpha_bar).sqrt() * noise
        eps, v = head(noisy, timesteps, conditions).float().chunk(2, dim=1)

        fraction = (v + 1) / 2
        log_variance = fraction * log_beta + (1 - fraction) * log_posterior
        mean = x_coef * noisy + eps_coef * eps.detach()
        at_zero = timesteps[:, None] == 0
        target = torch.where(at_zero, tokens, x_coef * noisy + eps_coef * noise)
        error = (target - mean) ** 2 * torch.exp(-log_variance)
        divergence = 0.5 * (log_variance - log_posterior - 1 + torch.exp(log_posterior - log_variance) + error)
        likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + error)
        bound = torch.where(at_zero, likelihood, divergence) / math.log(2)
        return ((eps - noise) ** 2).mean(dim=1), bound.mean(dim=1)
