"""What a step does: the tokens that it predicts, its CFG scale, and the timesteps of its denoising chains.

A `Schedule` says nothing about caching. `mar_schedule` makes MAR's own (arXiv 2406.11838) for plans made by hand;
`models.methods` makes all others.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffusion.schedule import respaced_timesteps
from diffusion.solver import SolverSteps

CFG_SCHEDULES = ("linear", "constant")


class Chain(NamedTuple):
    """A denoising chain: its timesteps, and the number of tokens per image that it denoises.

    The timesteps, of the 1000 of training, are descending. A `solver`, which LazyMAR does not use, evaluates the head
    at them; without one, each is an ancestral denoising step, which removes some noise and adds fresh noise.
    """

    timesteps: tuple[float, ...]
    num_tokens: int
    solver: SolverSteps | None = None


class ScheduledStep(NamedTuple):
    """What one autoregressive step does.

    cfg:    the CFG scale, at least 1; 1 is a step without guidance.
    chains: one for all of the step's tokens; or several, for the tokens as `Schedule.score_tokens` orders them.
    """

    cfg: float
    chains: tuple[Chain, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens per image that the step predicts."""
        return sum(chain.num_tokens for chain in self.chains)


@dataclass(frozen=True)
class Schedule:
    """The autoregressive steps, in order.

    Args:
        steps:        one or more.
        stages:       for each position of the token grid, a number; tokens are predicted in ascending order of it, and
                      in random order where it is equal. None: in random order.
        score_tokens: scores tokens [B, k] by their conditions [B, k, D]. If a step has several chains, the first takes
                      the tokens with the highest scores.
        known:        positions of the tokens that are known from the start (inpainting), ascending.
        temperature:  scales the noise of the denoising steps; with a solver, the initial noise.

    Raises ValueError for a step without tokens, for several chains without `score_tokens`, and for a CFG scale or a
    temperature out of range.
    """

    steps: tuple[ScheduledStep, ...]
    stages: tuple[int, ...] | None = None
    score_tokens: Callable[[Tensor], Tensor] | None = None
    known: tuple[int, ...] = ()
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature}")
        for number, step in enumerate(self.steps):
            if min((chain.num_tokens for chain in step.chains), default=0) < 1:
                raise ValueError(f"tokens_per_step must be at least 1, but step {number} predicts none")
            if len(step.chains) > 1 and self.score_tokens is None:
                raise ValueError(f"score_tokens must be given, because step {number} has several chains")
            check_cfg(step.cfg)

    @property
    def seq_len(self) -> int:
        """Number of tokens per image."""
        return len(self.known) + sum(step.num_tokens for step in self.steps)


def mar_schedule(
    seq_len: int,
    *,
    num_iter: int = 64,
    tokens_per_step: Sequence[int] | None = None,
    cfg: float | Sequence[float] = 3.25,
    num_sampling_steps: int = 100,
    temperature: float = 1.0,
) -> Schedule:
    """Return MAR's schedule for images of `seq_len` tokens.

    Args:
        num_iter:           autoregressive steps.
        tokens_per_step:    the number of tokens of each step, in place of `num_iter` and MAR's cosine.
        cfg:                the CFG scale (1: no guidance), by MAR's linear schedule; or a list of one for each step.
        num_sampling_steps: denoising steps of each chain.
        temperature:        see `Schedule`.

    Raises ValueError, naming the argument, for one that is out of range.
    """
    counts = cosine_counts(seq_len, num_iter) if tokens_per_step is None else given_counts(seq_len, tokens_per_step)
    scales = list(cfg) if isinstance(cfg, Sequence) else cfg_scales(counts, cfg, "linear")
    if len(scales) != len(counts):
        raise ValueError(f"cfg must be one scale, or one for each of {len(counts)} steps, not {len(scales)}")
    timesteps = tuple(reversed(respaced_timesteps(num_sampling_steps)))
    steps = [ScheduledStep(scale, (Chain(timesteps, count),)) for scale, count in zip(scales, counts)]
    return Schedule(tuple(steps), temperature=temperature)


def given_counts(num_tokens: int, tokens_per_step: Sequence[int]) -> list[int]:
    """Return the number of tokens of each step as given. Raises ValueError unless they are all `num_tokens` tokens."""
    if sum(tokens_per_step) != num_tokens:
        raise ValueError(
            f"tokens_per_step must add up to the number of tokens, {num_tokens}, not {sum(tokens_per_step)}"
        )
    return list(tokens_per_step)


def cosine_counts(num_tokens: int, num_iter: int) -> list[int]:
    """Return the number of tokens that each step predicts: MAR's cosine, with at least one token per step."""
    wanted = (math.floor(num_tokens * math.cos(math.pi / 2 * step / num_iter)) for step in range(1, num_iter))
    return counts_from_masked(num_tokens, num_iter, wanted)


def counts_from_masked(num_tokens: int, num_iter: int, wanted: Iterable[int]) -> list[int]:
    """Return the number of tokens that each step predicts, at least one.

    `wanted` says how many tokens should be masked after each step but the last. Raises ValueError, naming num_iter.
    """
    if not 1 <= num_iter <= num_tokens:
        raise ValueError(f"num_iter must be 1 to the number of tokens, {num_tokens}, not {num_iter}")
    masked = [num_tokens]
    for count in wanted:
        masked.append(max(1, min(count, masked[-1] - 1)))
    return [before - after for before, after in zip(masked, [*masked[1:], 0])]


def cfg_scales(counts: Sequence[int], cfg: float, cfg_schedule: str) -> list[float]:
    """Return the CFG scale of each step, given the number of tokens that each step predicts."""
    check_cfg(cfg)
    if cfg_schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule must be {' or '.join(CFG_SCHEDULES)}, not {cfg_schedule!r}")
    if cfg_schedule == "constant":
        return [cfg] * len(counts)
    num_tokens = sum(counts)
    predicted = [sum(counts[: step + 1]) for step in range(len(counts))]
    # As in MAR's code, one token counts as masked at the last step.
    return [1 + (cfg - 1) * min(count, num_tokens - 1) / num_tokens for count in predicted]


def check_cfg(cfg: float) -> None:
    """Raise ValueError unless this can be a CFG scale."""
    if not (math.isfinite(cfg) and cfg >= 1):
        raise ValueError(f"cfg must be a finite number of at least 1 (1: no guidance), not {cfg}")
