"""A few-step solver of the head's probability flow ODE: DPM-Solver++ with data prediction (arXiv 2211.01095).

Every state of the solver is a linear combination of the initial noise and the data predictions so far. The weights
depend on the noise schedule alone, so they are computed beforehand, in float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.schedule import NUM_TRAIN_STEPS, cosine_betas

FIRST_TIMESTEP = 950.0  # of the multistep rule: in docs/methods.md
LOWEST_LOG_SNR = -5.1  # of the single-step rule: entries of the noise schedule below this half log-SNR are cut off


@dataclass(frozen=True)
class SolverSteps:
    """Denoising by evaluations of the head that a solver combines: noise is drawn once, and the variance is not used.

    Args:
        evaluations: evaluations of the head per token, 2 to 1000.
        rule:        "multistep" has order 2 and starts at timestep 950 (see docs/methods.md). "singlestep" has order 3
                     and starts where half the log-SNR is -5.1, as in eMIGM (arXiv 2503.07197). Both have steps of equal
                     log-SNR and end at the last timestep of training.

    Raises ValueError, naming num_sampling_steps, for values out of range.
    """

    evaluations: int
    rule: str = "multistep"

    def __post_init__(self) -> None:
        if not 2 <= self.evaluations <= NUM_TRAIN_STEPS:
            raise ValueError(
                f"num_sampling_steps must be 2 to {NUM_TRAIN_STEPS} evaluations of the solver, not {self.evaluations}: "
                "take solver:8, for example"
            )
        if self.rule not in RULES:
            raise ValueError(f"num_sampling_steps must be solver:N or solver:N:{'|'.join(RULES)}, not {self.rule!r}")

    def __str__(self) -> str:
        return f"solver:{self.evaluations}:{self.rule}"

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each evaluation, descending: real numbers on the scale of the 1000 of training."""
        return _solution(self).timesteps


@dataclass(frozen=True)
class Solution:
    """What a solver computes, in float64, for E evaluations.

    timesteps:      [E], descending.
    alphas, sigmas: [E] scales of the token and of the noise at each evaluation.
    weights:        [E, E + 1]; row i has the weights of the initial noise and of the data predictions 0 to i, whose
                    sum is the state after evaluation i; the last state is the token.
    """

    timesteps: tuple[float, ...]
    alphas: np.ndarray
    sigmas: np.ndarray
    weights: np.ndarray


class _Times:
    """The noise schedule at real timesteps: log alpha is interpolated linearly between those of training."""

    def __init__(self, lowest_log_snr: float = -np.inf) -> None:
        log_alphas = 0.5 * np.cumsum(np.log(1 - cosine_betas()))
        self.log_alphas = log_alphas[self._log_snr(log_alphas) >= lowest_log_snr]
        count = len(self.log_alphas)
        self.timesteps = np.arange(count) * NUM_TRAIN_STEPS / count  # stretched where entries are cut off

    @staticmethod
    def _log_snr(log_alphas: np.ndarray) -> np.ndarray:
        return log_alphas - 0.5 * np.log(-np.expm1(2 * log_alphas))

    def uniform(self, first: float, last: float, count: int) -> np.ndarray:
        """Return `count` timesteps from `first` to `last` at equal distances in log-SNR."""
        start, stop = self.log_snr(np.array([first, last]))
        log_alphas = -0.5 * np.logaddexp(0, -2 * np.linspace(start, stop, count))
        return np.interp(log_alphas, self.log_alphas[::-1], self.timesteps[::-1])

    def log_alpha(self, timesteps: np.ndarray) -> np.ndarray:
        return np.interp(timesteps, self.timesteps, self.log_alphas)

    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return half the log-SNR, log(alpha / sigma), lambda in the paper."""
        return self._log_snr(self.log_alpha(timesteps))


@functools.lru_cache
def _solution(steps: SolverSteps) -> Solution:
    return RULES[steps.rule](steps.evaluations)


def _solve(times: _Times, timesteps: np.ndarray, step: Callable[..., np.ndarray]) -> Solution:
    """Return the solution at `timesteps` [E + 1], the last of which is the end.

    `step(i, states, predictions, lambdas, alphas, sigmas)` returns the state at timestep i + 1, given the states and
    predictions at the timesteps before, each as its weights [E + 1].
    """
    alphas, lambdas = np.exp(times.log_alpha(timesteps)), times.log_snr(timesteps)
    sigmas = alphas / np.exp(lambdas)
    basis = np.eye(len(timesteps))
    states, predictions = [basis[0]], basis[1:]
    for index in range(len(timesteps) - 1):
        states.append(step(index, states, predictions, lambdas, alphas, sigmas))
    return Solution(tuple(timesteps[:-1].tolist()), alphas[:-1], sigmas[:-1], np.stack(states[1:]))


def _multistep(evaluations: int) -> Solution:
    """Order 2 from the predictions of this step and the step before; the first step has order 1."""
    times = _Times()

    def step(i, x, data, lambdas, alphas, sigmas):  # type: ignore[no-untyped-def]
        h = lambdas[i + 1] - lambdas[i]
        slope = (data[i] - data[i - 1]) / (lambdas[i] - lambdas[i - 1]) if i else 0
        return sigmas[i + 1] / sigmas[i] * x[i] - alphas[i + 1] * np.expm1(-h) * (data[i] + h / 2 * slope)

    return _solve(times, times.uniform(FIRST_TIMESTEP, 0, evaluations + 1), step)


def _singlestep(evaluations: int) -> Solution:
    """Steps of order 3, of which the last one or two have a lower order, so that the evaluations add up."""
    times = _Times(LOWEST_LOG_SNR)
    full = evaluations // 3
    orders = {0: [3] * (full - 1) + [2, 1], 1: [3] * full + [1], 2: [3] * full + [2]}[evaluations % 3]
    outer = times.uniform(times.timesteps[-1], 0, len(orders) + 1)
    inner = [times.uniform(s, t, order + 1)[:-1] for (s, t), order in zip(itertools.pairwise(outer), orders)]
    starts = np.repeat(np.cumsum([0, *orders[:-1]]), orders)  # of each evaluation, the first one of its step
    stops = np.repeat(np.cumsum(orders), orders)

    def step(i, x, data, lambdas, alphas, sigmas):  # type: ignore[no-untyped-def]
        start, target = starts[i], i + 1
        whole = lambdas[stops[i]] - lambdas[start]
        h = lambdas[target] - lambdas[start]
        state = sigmas[target] / sigmas[start] * x[start] - alphas[target] * np.expm1(-h) * data[start]
        if i == start:
            return state
        ratio = (lambdas[i] - lambdas[start]) / whole  # r1 or r2
        slope = (data[i] - data[start]) / ratio
        if stops[i] - start == 2:
            return state - alphas[target] * np.expm1(-h) / 2 * slope
        # In the paper's symbols: (r2 / r1) (phi(r2 h) + 1) inside the step, (1 / r2) (phi(h) + 1) at its end.
        return state + h / whole * alphas[target] * (np.expm1(-h) / h + 1) * slope

    return _solve(times, np.append(np.concatenate(inner), outer[-1]), step)


RULES = {"multistep": _multistep, "singlestep": _singlestep}


class Solver:
    """Denoises tokens by a solver. `dtype` is that of the tokens; `temperature` scales the initial noise."""

    def __init__(self, steps: SolverSteps, temperature: float, device: torch.device, dtype: torch.dtype) -> None:
        solution = _solution(steps)
        self.temperature, self.scales = temperature, list(zip(solution.alphas.tolist(), solution.sigmas.tolist()))
        self.weights = torch.from_numpy(solution.weights).to(device, dtype)[:, :, None, None]

    def begin(self, noise: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Return the initial state [n, C], and a function that returns the next one for a state, its eps and v.

        Of `noise` [1 or more, n, C] the first entry is used.
        """
        terms = noise.new_empty(len(self.scales) + 1, *noise.shape[1:])
        terms[0] = self.temperature * noise[0]
        numbers = itertools.count()

        def step(x: Tensor, eps: Tensor, v: Tensor) -> Tensor:
            number = next(numbers)
            alpha, sigma = self.scales[number]
            terms[number + 1] = (x - sigma * eps) / alpha
            return (self.weights[number, : number + 2] * terms[: number + 2]).sum(dim=0)

        return terms[0], step
