"""A few-step solver of the head's probability flow ODE: DPM-Solver++ with data prediction (arXiv 2211.01095).

Every state of the solver is a linear combination of the initial noise and the data predictions so far. The weights
depend on the noise schedule alone, so they are computed beforehand, in float64.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.schedule import NUM_TRAIN_STEPS, cosine_betas

SOLVER_RULES = ("multistep", "singlestep")
FIRST_TIMESTEP = 950.0  # of the multistep rule; docs/methods.md says why
LOWEST_LAMBDA = -5.1  # of the single-step rule: it cuts off the noise schedule where log(alpha / sigma) is lower


@dataclass(frozen=True)
class SolverSteps:
    """Denoising by a few evaluations of the head: noise is drawn once, and the learned variance is not used.

    Args:
        evaluations: evaluations of the head per token, 2 to 1000.
        rule:        "multistep" has order 2 and starts at timestep 950; "singlestep" has order 3, starts where
                     log(alpha / sigma) is -5.1, and is that of eMIGM (arXiv 2503.07197). Steps are equal in log-SNR.

    Raises ValueError, naming num_sampling_steps, for values out of range.
    """

    evaluations: int
    rule: str = "multistep"

    def __post_init__(self) -> None:
        if not 2 <= self.evaluations <= NUM_TRAIN_STEPS or self.rule not in SOLVER_RULES:
            allowed = f"solver:N or solver:N:{'|'.join(SOLVER_RULES)} with N from 2 to {NUM_TRAIN_STEPS}"
            raise ValueError(f"num_sampling_steps must be {allowed}, not {self}")

    def __str__(self) -> str:
        return f"solver:{self.evaluations}:{self.rule}"

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each evaluation, descending: real numbers on the scale of the 1000 of training."""
        return tuple(solution(self)[0].tolist())


@functools.lru_cache
def solution(steps: SolverSteps) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what a solver of E evaluations computes, in float64.

    These are the timesteps [E], descending; alphas and sigmas, the scales [E] of the token and of the noise there; and
    weights [E, E + 1]. Row i has the weights of the initial noise and of the E data predictions in the state after
    evaluation i, which is their sum. The last state is the token.

    Evaluation i moves from the state `start` to timestep i + 1. The data prediction is taken as linear in log-SNR, with
    the slope between evaluations `other` and i, which is integrated exactly or, unless `exact`, by half the step.
    """
    log_alphas = 0.5 * np.cumsum(np.log(1 - cosine_betas()))
    moves: list[tuple[int, int, bool]]  # start, other, exact
    if steps.rule == "multistep":
        times = _Times(log_alphas)
        timesteps = times.uniform(FIRST_TIMESTEP, 0, steps.evaluations)
        moves = [(i, max(i - 1, 0), False) for i in range(steps.evaluations)]
    else:
        times = _Times(log_alphas[_lambda(log_alphas) >= LOWEST_LAMBDA])
        full, left = divmod(steps.evaluations, 3)
        orders = [3] * (full - 1) + [2, 1] if left == 0 else [3] * full + [left]
        outer = times.uniform(times.timesteps[-1], 0, len(orders))
        inner = [times.uniform(s, t, order)[:-1] for (s, t), order in zip(itertools.pairwise(outer), orders)]
        timesteps = np.append(np.concatenate(inner), outer[-1])
        starts = itertools.accumulate(orders[:-1], initial=0)
        moves = [(start, start, order == 3) for start, order in zip(starts, orders) for _ in range(order)]

    alphas = np.exp(times.log_alpha(timesteps))
    lambdas = _lambda(times.log_alpha(timesteps))
    sigmas = alphas / np.exp(lambdas)
    terms = np.eye(len(timesteps))  # the initial noise and the data predictions
    states, data = [terms[0]], terms[1:]
    for i, (start, other, exact) in enumerate(moves):
        h = lambdas[i + 1] - lambdas[start]
        first = -np.expm1(-h)
        second = h - first if exact else first * h / 2
        slope = (data[i] - data[other]) / (lambdas[i] - lambdas[other]) if i != other else 0
        moved = alphas[i + 1] * (first * data[start] + second * slope)
        states.append(sigmas[i + 1] / sigmas[start] * states[start] + moved)
    return timesteps[:-1], alphas[:-1], sigmas[:-1], np.stack(states[1:])


class _Times:
    """Maps timesteps to log alpha, linearly interpolated; fewer than 1000 entries are spread over all timesteps."""

    def __init__(self, log_alphas: np.ndarray) -> None:
        self.log_alphas = log_alphas
        self.timesteps = np.arange(len(log_alphas)) * NUM_TRAIN_STEPS / len(log_alphas)

    def uniform(self, first: float, last: float, count: int) -> np.ndarray:
        """Return the timesteps [count + 1] of `count` steps from `first` to `last` that are equal in log-SNR."""
        start, stop = _lambda(self.log_alpha(np.array([first, last])))
        lambdas = np.linspace(start, stop, count + 1)
        return np.interp(-0.5 * np.logaddexp(0, -2 * lambdas), self.log_alphas[::-1], self.timesteps[::-1])

    def log_alpha(self, timesteps: np.ndarray) -> np.ndarray:
        return np.interp(timesteps, self.timesteps, self.log_alphas)


def _lambda(log_alphas: np.ndarray) -> np.ndarray:
    """Return log(alpha / sigma), lambda in the paper: half the log-SNR."""
    return log_alphas - 0.5 * np.log(-np.expm1(2 * log_alphas))


class Solver:
    """Denoises tokens by a solver. `dtype` is that of the tokens; `temperature` scales the initial noise."""

    def __init__(self, steps: SolverSteps, temperature: float, device: torch.device, dtype: torch.dtype) -> None:
        _, alphas, sigmas, weights = solution(steps)
        self.temperature, self.scales = temperature, list(zip(alphas.tolist(), sigmas.tolist()))
        self.weights = torch.from_numpy(weights).to(device, dtype)[:, :, None, None]

    def begin(self, noise: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Return the initial state [n, C], and a function that returns the next one for a state, its eps and v.

        Of `noise` [1 or more, n, C] the first entry is used.
        """
        terms = noise.new_empty(len(self.scales) + 1, *noise.shape[1:])
        terms[0] = self.temperature * noise[0]
        numbers = itertools.count(1)

        def step(x: Tensor, eps: Tensor, v: Tensor) -> Tensor:
            number = next(numbers)
            alpha, sigma = self.scales[number - 1]
            terms[number] = (x - sigma * eps) / alpha
            return (self.weights[number - 1, : number + 1] * terms[: number + 1]).sum(dim=0)

        return terms[0], step
