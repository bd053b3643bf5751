"""The head's noise schedule (improved DDPM, arXiv 2102.09672), for training and respaced for sampling."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

NUM_TRAIN_STEPS = 1000


def cosine_betas() -> np.ndarray:
    """Return the cosine schedule's betas, at most 0.999; float64 [1000]."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    edges = [alpha_bar(step / NUM_TRAIN_STEPS) for step in range(NUM_TRAIN_STEPS + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(edges)])


def check_num_sampling_steps(num_sampling_steps: int) -> None:
    """Raise ValueError unless a chain can have so many denoising steps."""
    if not 2 <= num_sampling_steps <= NUM_TRAIN_STEPS:
        raise ValueError(f"num_sampling_steps must be 2 to {NUM_TRAIN_STEPS}, not {num_sampling_steps}")


def respaced_timesteps(num_sampling_steps: int) -> list[int]:
    """Return the original timesteps that `num_sampling_steps` evenly strided steps retain, ascending.

    Raises ValueError outside 2..1000.
    """
    check_num_sampling_steps(num_sampling_steps)
    stride = (NUM_TRAIN_STEPS - 1) / (num_sampling_steps - 1)
    timesteps, running = [], 0.0
    for _ in range(num_sampling_steps):
        timesteps.append(round(running))
        running += stride
    return timesteps


class NoiseSchedule:
    """What depends on the noise schedule alone, respaced to ascending `timesteps`: float64, one entry per step [S].

    A sampling step with index i goes from i to i - 1 as `mean = x_coefficient * x + eps_coefficient * eps`, since x0 is
    not clipped, and adds noise of standard deviation `exp(log_std_base + log_std_slope * v)`, the learned interpolation
    between the two variance bounds.

    Args:
        timesteps: at least 2 of the 1000 of training; all of them give the schedule of training.
    """

    def __init__(self, timesteps: Sequence[int] = range(NUM_TRAIN_STEPS)) -> None:
        self.alpha_bars = np.cumprod(1 - cosine_betas())[list(timesteps)]
        previous = np.append(1.0, self.alpha_bars[:-1])
        betas = 1 - self.alpha_bars / previous
        posterior_variances = betas * (1 - previous) / (1 - self.alpha_bars)
        # The first posterior variance is 0: its logarithm is replaced by the second one's.
        self.log_posterior_variances = np.log(np.append(posterior_variances[1], posterior_variances[1:]))
        self.log_betas = np.log(betas)

        x0_coefficient = betas * np.sqrt(previous) / (1 - self.alpha_bars)
        carry_coefficient = (1 - previous) * np.sqrt(1 - betas) / (1 - self.alpha_bars)
        self.x_coefficient = x0_coefficient / np.sqrt(self.alpha_bars) + carry_coefficient
        self.eps_coefficient = -x0_coefficient * np.sqrt(1 / self.alpha_bars - 1)
        # log variance = f * log_betas + (1 - f) * log_posterior_variances with f = (v + 1) / 2
        self.log_std_base = (self.log_betas + self.log_posterior_variances) / 4
        self.log_std_slope = (self.log_betas - self.log_posterior_variances) / 4
