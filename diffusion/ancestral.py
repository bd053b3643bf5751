"""The ancestral steps of improved DDPM (arXiv 2102.09672), with the learned variance."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.schedule import NoiseSchedule


class Ancestral:
    """Denoises tokens by an ancestral step for each of `timesteps`, descending integers.

    `dtype` is that of the tokens; `temperature` scales the noise of every step, not the initial noise.
    """

    def __init__(
        self, timesteps: Sequence[float], temperature: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.temperature = temperature
        schedule = NoiseSchedule([int(timestep) for timestep in reversed(timesteps)])
        columns = [schedule.x_coefficient, schedule.eps_coefficient, schedule.log_std_base, schedule.log_std_slope]
        coefficients = torch.from_numpy(np.stack(columns, axis=1)).flip(0)  # [S, 4], in order of use
        self.coefficients = [row.unbind() for row in coefficients.to(device, dtype)]

    def begin(self, noise: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Return the initial state [n, C], and a function that returns the next one for a state, its eps and v.

        `noise` is [S + 1, n, C]: the initial state, then a draw for each step; the last one is not used.
        """
        steps = iter(zip(self.coefficients, [*noise[1:-1], None]))

        def step(x: Tensor, eps: Tensor, v: Tensor) -> Tensor:
            (x_coefficient, eps_coefficient, log_std_base, log_std_slope), draw = next(steps)
            mean = torch.addcmul(x_coefficient * x, eps_coefficient, eps)
            if draw is None:
                return mean
            std = torch.addcmul(log_std_base, log_std_slope, v).exp()
            return torch.addcmul(mean, std, draw, value=self.temperature)

        return noise[0], step
