"""The head's noise schedule (improved DDPM, arXiv 2102.09672), for training and respaced for sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_TRAIN_STEPS = 1000


def cosine_betas(num_steps: int = NUM_TRAIN_STEPS) -> np.ndarray:
    """The cosine schedule's betas, at most 0.999; float64 [num_steps]."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    edges = [alpha_bar(step / num_steps) for step in range(num_steps + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(edges)])


def check_num_sampling_steps(num_sampling_steps: int) -> None:
    """Raise ValueError unless a chain can have so many denoising steps."""
    if not 2 <= num_sampling_steps <= NUM_TRAIN_STEPS:
        raise ValueError(f"num_sampling_steps must be 2 to {NUM_TRAIN_STEPS}, not {num_sampling_steps}")


def respaced_timesteps(num_sampling_steps: int) -> list[int]:
    """The original timesteps that `num_sampling_steps` evenly strided steps retain, ascending.

    Raises ValueError outside 2..1000.
    """
    check_num_sampling_steps(num_sampling_steps)
    stride = (NUM_TRAIN_STEPS - 1) / (num_sampling_steps - 1)
    timesteps, running = [], 0.0
    for _ in range(num_sampling_steps):
        timesteps.append(round(running))
        running += stride
    return timesteps


@dataclass(frozen=True)
class NoiseSchedule:
    """Everything that depends on the schedule alone, float64, one entry per step [S].

    `timesteps` are the original ones (0..999), which the head is told; a sampling step with index i goes from i to
    i - 1 as `mean = x_coefficient * x + eps_coefficient * eps`, since x0 is not clipped, and adds noise of standard
    deviation `exp(log_std_base + log_std_slope * v)`, the learned interpolation between the two variance bounds.
    """

    timesteps: Sequence[int]
    alpha_bars: np.ndarray
    betas: np.ndarray
    log_betas: np.ndarray
    log_posterior_variances: np.ndarray
    x_coefficient: np.ndarray
    eps_coefficient: np.ndarray
    log_std_base: np.ndarray
    log_std_slope: np.ndarray

    @classmethod
    def create(cls, num_sampling_steps: int = NUM_TRAIN_STEPS) -> NoiseSchedule:
        """The schedule respaced to `num_sampling_steps`; 1000 gives the one of training."""
        return cls.of(respaced_timesteps(num_sampling_steps))

    @classmethod
    def of(cls, timesteps: Sequence[int]) -> NoiseSchedule:
        """The schedule respaced to ascending `timesteps`, of which there are at least 2."""
        alpha_bars = np.cumprod(1 - cosine_betas())[list(timesteps)]
        previous = np.append(1.0, alpha_bars[:-1])
        betas = 1 - alpha_bars / previous
        posterior_variances = betas * (1 - previous) / (1 - alpha_bars)
        # The first posterior variance is 0, whose logarithm the second one's stands for.
        log_posterior_variances = np.log(np.append(posterior_variances[1], posterior_variances[1:]))
        log_betas = np.log(betas)

        x0_coefficient = betas * np.sqrt(previous) / (1 - alpha_bars)
        carry_coefficient = (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bars)
        return cls(
            timesteps=timesteps,
            alpha_bars=alpha_bars,
            betas=betas,
            log_betas=log_betas,
            log_posterior_variances=log_posterior_variances,
            x_coefficient=x0_coefficient / np.sqrt(alpha_bars) + carry_coefficient,
            eps_coefficient=-x0_coefficient * np.sqrt(1 / alpha_bars - 1),
            # log variance = f * log_betas + (1 - f) * log_posterior_variances with f = (v + 1) / 2
            log_std_base=(log_betas + log_posterior_variances) / 4,
            log_std_slope=(log_betas - log_posterior_variances) / 4,
        )
