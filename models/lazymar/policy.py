"""What steps compute, store and reuse: LazyMAR's settings, with the paper's values as defaults.

A `CachePolicy` says nothing about which tokens a step predicts, or how.
"""

import itertools
import math
from dataclasses import dataclass

from models.lazymar.selection import RULES

REFERENCE_STEPS = 64  # number of autoregressive steps that the fractions of rows are listed for


@dataclass(frozen=True)
class CachePolicy:
    """LazyMAR's settings. The defaults are the paper's for 64 steps (arXiv 2503.12450 and the authors' code).

    Args:
        start_step:            every autoregressive step before this one is a refresh step, which computes all rows, in
                               both branches where guidance needs them; below 1, a fraction of all steps.
        refresh_interval:      distance between refresh steps from the start step on, which is one itself.
        refresh_steps:         the refresh steps themselves, in place of the two above; the first step always is one.
        prune_layer:           decoder block that chooses rows: from its attention on, only these are recomputed.
        recomputed_fractions:  (step, fraction) pairs: the fraction of rows that is recomputed from this step on; steps
                               are counted as in a run of 64.
        min_margin:            minimum number of rows to recompute besides the tokens predicted at this step and the
                               step before.
        selection:             how these rows are chosen, a key of `selection.RULES`.
        head_refresh_interval: the whole head runs at the first denoising step and at those whose index, which counts
                               down, is a multiple of this; a value below 1 is a fraction of the chain's steps.
        head_skipped_blocks:   head blocks whose cached residual is reused between full denoising steps.
        head_warmup:           the other head blocks are computed while the denoising step's index is above this
                               fraction of the chain: 0.9 is the first tenth.
        condition_interval:    every so many steps after a refresh step, a lazy step computes both branches and stores
                               their difference anew; None: only refresh steps do.
        token_cache, condition_cache, head_cache: switch each cache on or off.

    Raises ValueError, naming the field, for a value out of range.
    """

    start_step: int | float = 5
    refresh_interval: int = 9
    refresh_steps: tuple[int, ...] | None = None
    prune_layer: int = 3
    recomputed_fractions: tuple[tuple[int, float], ...] = (
        (0, 1.0), (20, 0.6), (21, 0.5), (25, 0.4), (30, 0.15), (35, 0.12), (40, 0.05)
    )  # fmt: skip
    min_margin: int = 15
    selection: str = "similarity"
    head_refresh_interval: int | float = 7
    head_skipped_blocks: tuple[int, ...] = (1, 2, 3, 4)
    head_warmup: float = 0.9
    condition_interval: int | None = None
    token_cache: bool = True
    condition_cache: bool = True
    head_cache: bool = True

    def __post_init__(self) -> None:
        def check(valid: bool, name: str, wanted: str) -> None:
            if not valid:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")

        def is_count(value: float, minimum: int) -> bool:
            return value >= minimum and value % 1 == 0

        start, interval = self.start_step, self.head_refresh_interval
        check(is_count(start, 0) or 0 < start < 1, "start_step", "a whole number, or a fraction between 0 and 1")
        check(self.refresh_interval >= 1, "refresh_interval", "at least 1")
        check(all(step >= 0 for step in self.refresh_steps or ()), "refresh_steps", "numbers of steps from 0")
        check(self.prune_layer >= 0, "prune_layer", "at least 0")
        check(self.min_margin >= 0, "min_margin", "at least 0")
        check(self.selection in RULES, "selection", " or ".join(RULES))
        is_interval = is_count(interval, 1) or 0 < interval < 1
        check(is_interval, "head_refresh_interval", "a whole number from 1, or a fraction between 0 and 1")
        check(all(block >= 0 for block in self.head_skipped_blocks), "head_skipped_blocks", "block numbers from 0")
        check(0 <= self.head_warmup <= 1, "head_warmup", "from 0 to 1")
        check(self.condition_interval is None or self.condition_interval >= 1, "condition_interval", "at least 1")
        starts = [start for start, _ in self.recomputed_fractions]
        in_order = starts[:1] == [0] and all(before < after for before, after in itertools.pairwise(starts))
        in_range = all(0 <= fraction <= 1 for _, fraction in self.recomputed_fractions)
        check(
            in_order and in_range,
            "recomputed_fractions",
            "pairs step:fraction with rising steps from 0, fractions 0 to 1",
        )

    def is_refresh(self, step: int, num_iter: int) -> bool:
        """Return whether a step of a run of `num_iter` steps is a refresh step."""
        if self.refresh_steps is not None:
            return step == 0 or step in self.refresh_steps
        start = count_of(self.start_step, num_iter)
        return step == 0 or step < start or (step - start) % self.refresh_interval == 0

    def computes_both(self, step: int, num_iter: int) -> bool:
        """Return whether a step of a run with a condition cache computes both branches of guidance."""
        if self.condition_interval is None:
            return self.is_refresh(step, num_iter)
        last_refresh = next(index for index in range(step, -1, -1) if self.is_refresh(index, num_iter))
        return (step - last_refresh) % self.condition_interval == 0

    def rows_recomputed(self, step: int, num_iter: int, num_rows: int, num_always: int) -> int:
        """Return how many of `num_rows` rows a lazy step recomputes, of which `num_always` are always recomputed.

        The fraction is looked up at the same progress through 64 steps.
        """
        progress = step * REFERENCE_STEPS // num_iter
        fraction = [fraction for start, fraction in self.recomputed_fractions if start <= progress][-1]
        return min(num_rows, max(num_always + self.min_margin, int(num_rows * fraction)))


def count_of(value: int | float, total: int) -> int:
    """Return a number of steps: `value`, or `value * total` rounded up if `value` is a fraction."""
    return math.ceil(round(value * total, 6)) if 0 < value < 1 else int(value)


NO_CACHE = CachePolicy(token_cache=False, condition_cache=False, head_cache=False)
