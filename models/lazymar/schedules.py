"""Schedules over a run's autoregressive steps: which tokens come when, how many, and in how many denoising steps.

Those of MAR (arXiv 2406.11838) are here, and those that later methods put in their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusion.schedule import check_num_sampling_steps, respaced_timesteps

# Where an annealed chain begins. The first denoising step divides by sqrt(alpha_bar), which is 1/13 at 950 and 1/642 at
# 998: a chain that is short takes the error of that step along.
ANNEALED_FIRST_TIMESTEP = 950
ANNEALINGS = ("linear", "cosine", "two-stage", "constant", "generation")


# Tokens


def tokens_masked(seq_len: int, num_iter: int) -> list[int]:
    """Return how many tokens are masked before the first step and after each one: `num_iter` + 1 counts.

    This is MAR's cosine schedule, with at least one token predicted at every step.
    """
    masked = [seq_len]
    for step in range(num_iter - 1):
        wanted = math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter))
        masked.append(max(1, min(wanted, masked[-1] - 1)))
    return [*masked, 0]


def stages_of_positions(seq_len: int, num_stages: int) -> list[int]:
    """Return the stage at which each position of a square grid is predicted, 0 to `num_stages` - 1, row-major.

    The last stage is one half of a checkerboard: row + column is odd. The half of the other, on the same diagonals two
    apart, is the stage before, and so on (GtR, arXiv 2510.17171).

    Raises ValueError, naming num_stages, if the grid cannot be halved so often.
    """
    side = math.isqrt(seq_len)
    period = 2 ** (num_stages - 1) if 1 <= num_stages <= seq_len else 0
    if side**2 != seq_len or period == 0 or side % period:
        raise ValueError(
            f"num_stages must be one for which 2^(num_stages - 1) divides the side of the token grid, "
            f"{math.sqrt(seq_len):g}, not {num_stages}: each stage but the first takes half of what is left"
        )
    stages = []
    for row in range(side):
        for column in range(side):
            diagonal = (row + column) % period or period
            halvings = (diagonal & -diagonal).bit_length() - 1  # how often the diagonal's number can be halved
            stages.append(num_stages - 1 - halvings)
    return stages


def spread_evenly(sizes: list[int], num_iter: tuple[int, ...]) -> list[int]:
    """Return how many tokens are known before the first step and after each one, given each stage's size and steps.

    A stage's tokens are spread over its steps as evenly as whole numbers allow.

    Raises ValueError, naming num_iter, unless there is a number of steps for each stage, each with a token to predict.
    """
    if len(num_iter) != len(sizes):
        given = ",".join(map(str, num_iter))
        raise ValueError(f"num_iter must have a number of steps for each of the {len(sizes)} stages, not {given}")
    known = [0]
    for size, steps in zip(sizes, num_iter):
        if not 1 <= steps <= size:
            raise ValueError(f"num_iter must be 1 to {size} for a stage of {size} tokens, not {steps}")
        before = known[-1]
        known += [before + size * (step + 1) // steps for step in range(steps)]
    return known


# Denoising steps


@dataclass(frozen=True)
class AnnealedSteps:
    """Denoising steps that grow fewer as an image takes shape (DiSA, arXiv 2505.20297).

    Every chain begins at timestep 950: up to one in twenty of the denoising steps collapse there, and are not taken.

    Args:
        upper:    denoising steps at the first autoregressive step, 2 to 1000.
        lower:    denoising steps that are approached, at least 2 and at most `upper`.
        schedule: "linear" or "cosine" from the first step to the last; "two-stage": `upper` in the first half of the
                  steps, `lower` in the second; "constant": `lower` always; "generation": linear up to the last stage of
                  the order, and `lower` there (GtR, arXiv 2510.17171).

    Raises ValueError, naming num_sampling_steps, for values out of range.
    """

    upper: int = 50
    lower: int = 5
    schedule: str = "linear"

    def __post_init__(self) -> None:
        for steps in (self.upper, self.lower):
            check_num_sampling_steps(steps)
        if self.lower > self.upper:
            raise ValueError(
                f"num_sampling_steps must not rise: lower is {self.lower}, above upper, which is {self.upper}"
            )
        if self.schedule not in ANNEALINGS:
            raise ValueError(
                f"num_sampling_steps must be annealed by a schedule of {', '.join(ANNEALINGS)}, not {self.schedule!r}"
            )

    def at(self, step: int, num_iter: int, num_generating: int) -> int:
        """Return the denoising steps of an autoregressive step before duplicates collapse.

        `num_generating` of the `num_iter` steps come before the last stage.
        """
        last, span = num_iter - 1, self.upper - self.lower
        if self.schedule == "generation":
            last, step = num_generating - 1, min(step, num_generating)
        if last < 1:  # a single step, at which the fall begins
            return self.upper if step == 0 and self.schedule in ("linear", "cosine", "generation") else self.lower
        if self.schedule in ("linear", "generation"):
            return self.lower + max(0, int((last - step) / last * span))
        if self.schedule == "cosine":
            return self.lower + int((math.cos(math.pi * step / last) + 1) / 2 * span)
        return self.lower + (span if self.schedule == "two-stage" and step < last / 2 else 0)


def chain_timesteps(steps: int, first: int | None = None) -> tuple[int, ...]:
    """Return the timesteps of a chain of `steps` denoising steps, in the order of use.

    Later ones than `first` become `first`, and only one of them stays.
    """
    timesteps = respaced_timesteps(steps)
    if first is not None:
        timesteps = sorted({min(timestep, first) for timestep in timesteps})
    return tuple(reversed(timesteps))
