"""The training loss of the diffusion head (improved DDPM's hybrid loss)."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule


@functools.cache
def _coefficients(device: torch.device) -> Tensor:
    """Return what the loss needs of the schedule, by timestep: [1000, 5]."""
    schedule = NoiseSchedule()
    names = ("x_coefficient", "eps_coefficient", "log_betas", "log_posterior_variances", "alpha_bars")
    rows = [torch.as_tensor(getattr(schedule, name), dtype=torch.float32, device=device) for name in names]
    return torch.stack(rows, dim=1)


def hybrid_loss(
    head: Callable[..., Tensor], tokens: Tensor, conditions: Tensor, timesteps: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the noise-prediction error [N] and the bound [N] of `tokens` [N, C] with `noise` [N, C].

    The variational bound alone trains the learned variance; its gradient does not reach the predicted noise. It is in
    bits per channel. At t = 0, where the true posterior is a point, it is the token's negative log likelihood.
    """
    x_coef, eps_coef, log_beta, log_posterior, alpha_bar = _coefficients(tokens.device)[timesteps].split(1, dim=1)
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
