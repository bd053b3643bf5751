"""Everything that may be varied about the caches: numbers and switches, with the paper's values as defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

SELECTIONS = ("similarity", "random")
REFERENCE_STEPS = 64  # the number of steps that the kept fractions are listed for
REFERENCE_DENOISING_STEPS = 100  # the length of chain that the head's refresh interval is meant for


def option(default: Any, help_text: str, **shown: str) -> Any:
    """Declare a field with what a command line says about it."""
    return field(default=default, metadata={"help": help_text, **shown})


@dataclass(frozen=True)
class CachePolicy:
    """LazyMAR's settings; the defaults are the paper's for 64 steps (arXiv 2503.12450 and the authors' code).

    Raises ValueError, naming the field, for a value out of range.
    """

    start_step: int | float = option(
        5,
        "every step before this one is a refresh, which computes everything; a fraction below 1 is of all steps, and "
        "other numbers are of 64 steps if the order has stages",
    )
    refresh_interval: int = option(
        9, "from the start step on, one step in this many is a refresh; of 64 steps if the order has stages"
    )
    prune_layer: int = option(3, "decoder block after whose attention only the least similar rows go on")
    kept_fractions: tuple[tuple[int, float], ...] = option(
        ((0, 1.0), (20, 0.6), (21, 0.5), (25, 0.4), (30, 0.15), (35, 0.12), (40, 0.05)),
        "fraction of rows that pass the prune layer, from each listed step of 64 on",
    )
    min_margin: int = option(15, "rows kept at least, besides those predicted at this step and the one before")
    selection: str = option(
        "similarity",
        "which rows pass the prune layer: the least similar, or any",
        metavar="{" + ",".join(SELECTIONS) + "}",
    )
    head_refresh_interval: int = option(
        7,
        "denoising steps whose index is a multiple of this run the head in full; of 100 steps if their number falls",
    )
    head_skipped_blocks: tuple[int, ...] = option((1, 2, 3, 4), "head blocks replaced by what they last added")
    head_warmup: float = option(0.9, "above this fraction of the denoising steps the other head blocks are computed")
    lazy_sampling_steps: int | None = option(None, "denoising steps of lazy steps at most, for all but detailed tokens")
    token_cache: bool = option(True, "reuse token features: the encoder's keys and values, the decoder's pruned rows")
    condition_cache: bool = option(True, "reuse the difference between the unconditional and conditional branch")
    head_cache: bool = option(True, "reuse the diffusion head's features between denoising steps")

    def __post_init__(self) -> None:
        def check(valid: bool, name: str, wanted: str) -> None:
            if not valid:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")

        is_valid = self.start_step >= 0 and (self.start_step < 1 or self.start_step % 1 == 0)
        check(is_valid, "start_step", "at least 0, whole or a fraction below 1 of all steps")
        check(self.refresh_interval >= 1, "refresh_interval", "at least 1")
        check(self.prune_layer >= 0, "prune_layer", "at least 0")
        check(self.min_margin >= 0, "min_margin", "at least 0")
        check(self.selection in SELECTIONS, "selection", " or ".join(SELECTIONS))
        check(self.head_refresh_interval >= 1, "head_refresh_interval", "at least 1")
        check(all(block >= 0 for block in self.head_skipped_blocks), "head_skipped_blocks", "block numbers from 0")
        check(0 <= self.head_warmup <= 1, "head_warmup", "from 0 to 1")
        check(self.lazy_sampling_steps is None or self.lazy_sampling_steps >= 2, "lazy_sampling_steps", "at least 2")
        starts = [start for start, _ in self.kept_fractions]
        in_order = starts[:1] == [0] and all(before < after for before, after in zip(starts, starts[1:]))
        in_range = all(0 <= fraction <= 1 for _, fraction in self.kept_fractions)
        check(in_order and in_range, "kept_fractions", "pairs step:fraction with rising steps from 0, fractions 0 to 1")

    def of_run(self, num_iter: int, has_stages: bool) -> CachePolicy:
        """Return the policy with start step and refresh interval in steps of a run of `num_iter` steps.

        With stages they keep their place in the run, as they are given for 64 steps; lazy steps stay if there are any.
        """
        start_step, refresh_interval = self.start_step, self.refresh_interval
        if has_stages and refresh_interval > 1:
            refresh_interval = max(2, math.ceil(refresh_interval * num_iter / REFERENCE_STEPS))
        if 0 < start_step < 1:
            start_step = math.ceil(round(start_step * num_iter, 6))
        elif has_stages:
            start_step = math.ceil(start_step * num_iter / REFERENCE_STEPS)
        return replace(self, start_step=int(start_step), refresh_interval=refresh_interval)

    def kept_fraction(self, step: int, num_iter: int) -> float:
        """Return the fraction of rows kept, looked up at the same progress through a run of `num_iter` steps."""
        progress = step * REFERENCE_STEPS // num_iter
        return [fraction for start, fraction in self.kept_fractions if start <= progress][-1]
