"""The methods that sample from MAR without training, each as what it changes about MAR; `+` puts them together.

A method is data, from which `plan.make_plan` decides what every step computes. Where nothing is said, a figure is from
the paper and its code. Wherever we had to assume something, the declaration says so.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from diffusion.schedule import check_num_sampling_steps
from models.lazymar.policy import REFERENCE_STEPS, CachePolicy, option
from models.lazymar.schedules import ANNEALED_FIRST_TIMESTEP, ANNEALINGS, AnnealedSteps


@dataclass(frozen=True)
class DetailedTokens:
    """Tokens of the last stage that get a longer denoising chain: those whose conditions vary most across channels.

    Where the others take more denoising steps than is said here, they take as many.

    Args:
        share:              of the tokens that a step predicts, in each image by itself.
        num_sampling_steps: their denoising steps.

    Raises ValueError for values out of range.
    """

    share: float = 0.1
    num_sampling_steps: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"detailed_tokens must be a share between 0 and 1, not {self.share}")
        check_num_sampling_steps(self.num_sampling_steps)


@dataclass(frozen=True)
class Method:
    """The settings that decide what sampling an image costs. The defaults are MAR's.

    Raises ValueError, naming the field, for a value out of range.
    """

    num_stages: int = option(1, "stages of the order of prediction; 1 is a random order, more halve a checkerboard")
    num_iter: int | tuple[int, ...] = option(
        REFERENCE_STEPS,
        "autoregressive steps: at most the number of tokens; of several stages a number for each, e.g. 24,6,2",
    )
    num_sampling_steps: int | AnnealedSteps = option(
        100,
        "denoising steps of the diffusion head, e.g. 100; or 50:5, which falls over the autoregressive steps, or "
        "50:5:cosine, by one of the schedules " + ", ".join(ANNEALINGS),
    )
    detailed_tokens: DetailedTokens | None = option(
        None, "share of the last stage's tokens that take more denoising steps, and how many, e.g. 0.1:50"
    )
    unguided_below: float = option(1.0, "autoregressive steps whose CFG scale is below this are without guidance")
    cache: CachePolicy | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_sampling_steps, int):
            check_num_sampling_steps(self.num_sampling_steps)
        if not self.unguided_below >= 1:
            raise ValueError(f"unguided_below must be at least 1, not {self.unguided_below}")

        if self.num_stages == 1 and self.detailed_tokens:
            raise ValueError(
                "detailed_tokens are of the last stage of several: give num_stages, too, or leave them out"
            )
        if self.num_stages == 1 and getattr(self.num_sampling_steps, "schedule", None) == "generation":
            raise ValueError(
                "num_sampling_steps falls by the schedule generation up to the last stage of several: give num_stages, "
                "too, or take another schedule, such as linear"
            )

    @property
    def changes(self) -> dict[str, Any]:
        """The fields, by name, that are not as in MAR."""
        settings = {setting.name: (getattr(self, setting.name), setting.default) for setting in fields(self)}
        return {name: value for name, (value, default) in settings.items() if value != default}

    @property
    def is_annealed(self) -> bool:
        """True if the number of denoising steps depends on the autoregressive step."""
        return isinstance(self.num_sampling_steps, AnnealedSteps)

    @property
    def first_timestep(self) -> int | None:
        """The timestep that no chain begins above; None if there is none."""
        return ANNEALED_FIRST_TIMESTEP if self.is_annealed else None

    def denoising_steps(self, num_iter: int, num_generating: int) -> list[int]:
        """Return the denoising steps asked for at each of `num_iter` steps, `num_generating` of which come before the
        last stage."""
        if isinstance(self.num_sampling_steps, AnnealedSteps):
            return [self.num_sampling_steps.at(step, num_iter, num_generating) for step in range(num_iter)]
        return [self.num_sampling_steps] * num_iter

    def replaced(self, **settings: Any) -> Method:
        """Return the method with other settings. Raises TypeError for one that methods do not have."""
        return replace(self, **settings)


LAZYMAR = Method(cache=CachePolicy())  # arXiv 2503.12450

# DiSA (arXiv 2505.20297).
DISA = Method(num_sampling_steps=AnnealedSteps(upper=50, lower=5, schedule="linear"))

# GtR, generation then reconstruction (arXiv 2510.17171). An independent implementation from second-hand facts, since no
# code is public. We assume
# - the steps of each stage, from the tokens per step that the paper is said to have (2.67, 10.67 and 64 of 256), spread
#   as evenly as whole numbers allow;
# - that every chain begins at timestep 950, as in DiSA;
# - that the tokens which take 50 denoising steps are chosen at each step, in each image by itself, by their conditions
#   of the conditional branch, as the head gets them.
GTR = Method(
    num_stages=3,
    num_iter=(24, 6, 2),
    num_sampling_steps=AnnealedSteps(upper=50, lower=20, schedule="generation"),
    detailed_tokens=DetailedTokens(share=0.1, num_sampling_steps=50),
)

# ReCAP (arXiv 2505.19089): the first half of the steps in full, then every other one. Of the tokens, the steps between
# compute only those that they and the step before predict, and take 40 denoising steps. Unlike there, the first decoder
# block sees the buffer as the local step's encoder has it, which costs nothing.
RECAP = Method(
    cache=CachePolicy(
        start_step=0.5,
        refresh_interval=2,
        prune_layer=0,
        kept_fractions=((0, 0.0),),
        min_margin=0,
        lazy_sampling_steps=40,
        condition_cache=False,
        head_cache=False,
    )
)

# Guidance in a limited interval, known from diffusion models (arXiv 2404.07724); here of the autoregressive steps.
LATE_GUIDANCE = Method(unguided_below=1.1)

# Our own composition, for whoever just wants images: LazyMAR's caches, with half as many refreshes, on GtR's order and
# chains in 20 steps, and no guidance where it matters little. docs/methods.md says what was tried.
FAST = GTR.replaced(num_iter=(15, 3, 2), unguided_below=1.2, cache=CachePolicy(refresh_interval=18))

METHODS = {
    "mar": Method(),
    "lazymar": LAZYMAR,
    "disa": DISA,
    "gtr": GTR,
    "recap": RECAP,
    "lateguidance": LATE_GUIDANCE,
    "fast": FAST,
}

WHAT_FIELDS_DECIDE = {
    "num_stages": "the order of prediction",
    "num_iter": "the number of tokens per step",
    "num_sampling_steps": "the number of denoising steps",
    "detailed_tokens": "which tokens take more denoising steps",
    "unguided_below": "where guidance begins",
    "cache": "what is cached",
}


def find_method(name: str) -> Method:
    """Return the method of a name, or the composition of those joined by "+".

    Raises ValueError, naming method, for an unknown name, or for methods that contradict each other.
    """
    names = [part.strip().lower() for part in name.split("+")]
    for part in names:
        if part not in METHODS:
            raise ValueError(f"method {part!r} is unknown: choose from {', '.join(METHODS)}, or join several by +")
    composed, decided_by = Method(), dict[str, str]()
    for part in names:
        if part == "mar" and len(names) > 1:
            raise ValueError(f"method {name} is what every method changes, and changes nothing itself: leave mar out")
        for setting, value in METHODS[part].changes.items():
            other = decided_by.setdefault(setting, part)
            if names.count(part) > 1:
                raise ValueError(f"method {name} has {part} twice: once is enough")
            if other != part:
                raise ValueError(
                    f"method {name} cannot be: {other} and {part} both decide {WHAT_FIELDS_DECIDE[setting]}; "
                    f"leave one out"
                )
            composed = composed.replaced(**{setting: value})
    return composed


def name_of(method: Method) -> str | None:
    """Return the name of a method, or of a composition of methods as they are declared; None if it has none."""
    parts, left = [], method.changes
    for name, declared in METHODS.items():
        if declared.changes and all(left.get(setting) == value for setting, value in declared.changes.items()):
            parts.append(name)
            left = {setting: value for setting, value in left.items() if setting not in declared.changes}
    return None if left else "+".join(parts) or "mar"
