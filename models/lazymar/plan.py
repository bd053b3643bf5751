"""What a run computes at which step: the caching policy, and the plan that follows from it before the first step.

`python -m models.lazymar --help` prints the plan of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CFG_SCHEDULES = ("linear", "constant")
SELECTIONS = ("similarity", "random")
REFERENCE_STEPS = 64  # the number of steps that the kept fractions are listed for


def _option(default, help_text: str):
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class CachePolicy:
    """LazyMAR's settings; the defaults are the paper's for 64 steps (arXiv 2503.12450 and the authors' code).

    Raises ValueError, naming the field, for a value out of range.
    """

    start_step: int = _option(5, "all steps before this one are computed in full")
    refresh_interval: int = _option(9, "from the start step on, one step in this many is computed in full")
    prune_layer: int = _option(3, "decoder block after whose attention only the least similar rows go on")
    kept_fractions: tuple[tuple[int, float], ...] = _option(
        ((0, 1.0), (20, 0.6), (21, 0.5), (25, 0.4), (30, 0.15), (35, 0.12), (40, 0.05)),
        "fraction of rows kept, from each listed step of 64 on",
    )
    min_margin: int = _option(15, "rows kept at least, besides those predicted at this step and the one before")
    selection: str = _option("similarity", "rows that pass the prune layer: the least similar, or any (random)")
    head_refresh_interval: int = _option(7, "denoising steps whose index is a multiple of this run the head in full")
    head_skipped_blocks: tuple[int, ...] = _option((1, 2, 3, 4), "head blocks replaced by what they last added")
    head_warmup: float = _option(0.9, "above this fraction of the denoising steps the other head blocks are computed")
    token_cache: bool = _option(True, "reuse token features: the encoder's keys and values, the decoder's pruned rows")
    condition_cache: bool = _option(True, "reuse the difference between the unconditional and the conditional half")
    head_cache: bool = _option(True, "reuse the diffusion head's features between denoising steps")

    def __post_init__(self) -> None:
        def check(valid: bool, name: str, wanted: str) -> None:
            if not valid:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")

        check(self.start_step >= 0, "start_step", "at least 0")
        check(self.refresh_interval >= 1, "refresh_interval", "at least 1")
        check(self.prune_layer >= 0, "prune_layer", "at least 0")
        check(self.min_margin >= 0, "min_margin", "at least 0")
        check(self.selection in SELECTIONS, "selection", " or ".join(SELECTIONS))
        check(self.head_refresh_interval >= 1, "head_refresh_interval", "at least 1")
        check(all(block >= 0 for block in self.head_skipped_blocks), "head_skipped_blocks", "block numbers from 0")
        check(0 <= self.head_warmup <= 1, "head_warmup", "from 0 to 1")
        starts = [start for start, _ in self.kept_fractions]
        in_order = starts[:1] == [0] and all(before < after for before, after in zip(starts, starts[1:]))
        in_range = all(0 <= fraction <= 1 for _, fraction in self.kept_fractions)
        check(in_order and in_range, "kept_fractions", "pairs step:fraction with rising steps from 0, fractions 0 to 1")

    def is_refresh(self, step: int) -> bool:
        """Whether everything is computed at this step."""
        return step == 0 or step < self.start_step or (step - self.start_step) % self.refresh_interval == 0

    def kept_fraction(self, step: int, num_iter: int) -> float:
        """The fraction of rows kept, looked up at the same progress through the run."""
        progress = step * REFERENCE_STEPS // num_iter
        return [fraction for start, fraction in self.kept_fractions if start <= progress][-1]


@dataclass(frozen=True)
class Step:
    """One autoregressive step. Tokens are counted in the order in which the run predicts them.

    index:        0-based.
    start, stop:  the tokens predicted now; those before `start` are known.
    previous:     the first token that was predicted at the previous step.
    cfg:          guidance scale.
    refresh:      whether everything is computed (always, without a policy).
    num_kept:     rows, of buffer and tokens, that pass the prune layer.
    horizon:      the token up to which the conditions cached here are used (`stop` if none are cached here).
    """

    index: int
    start: int
    stop: int
    previous: int
    cfg: float
    refresh: bool
    num_kept: int
    horizon: int


def tokens_masked(seq_len: int, num_iter: int) -> list[int]:
    """Tokens still masked before the first step and after each one, by the cosine schedule; `num_iter` + 1 counts."""
    masked = [seq_len]
    for step in range(num_iter - 1):
        wanted = math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter))
        masked.append(max(1, min(wanted, masked[-1] - 1)))
    return [*masked, 0]


def make_plan(
    seq_len: int, buffer_size: int, num_iter: int, cfg: float, cfg_schedule: str, policy: CachePolicy | None
) -> list[Step]:
    """The steps of a run over `seq_len` tokens with `buffer_size` rows in front of them.

    Raises ValueError for settings out of range.
    """
    if not 1 <= num_iter <= seq_len:
        raise ValueError(f"num_iter must be 1 to the number of tokens, {seq_len}, not {num_iter}")
    if not (math.isfinite(cfg) and cfg >= 1):
        raise ValueError(f"cfg must be a finite number of at least 1 (1: no guidance), not {cfg}")
    if cfg_schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule must be {' or '.join(CFG_SCHEDULES)}, not {cfg_schedule!r}")
    num_rows = buffer_size + seq_len
    known = [seq_len - masked for masked in tokens_masked(seq_len, num_iter)]
    refreshes = [policy is None or policy.is_refresh(index) for index in range(num_iter)]

    steps = []
    for index, (start, stop) in enumerate(zip(known, known[1:])):
        previous = known[max(index - 1, 0)]
        # The schedule counts one token as masked at the last step.
        scale = 1 + (cfg - 1) * min(stop, seq_len - 1) / seq_len if cfg_schedule == "linear" else cfg
        num_kept = num_rows
        if not refreshes[index] and policy.token_cache:
            wanted = int(num_rows * policy.kept_fraction(index, num_iter))
            num_kept = min(num_rows, max(stop - previous + policy.min_margin, wanted))
        horizon = index + 1
        if policy is not None and policy.condition_cache and refreshes[index]:
            while horizon < num_iter and not refreshes[horizon]:
                horizon += 1
        steps.append(Step(index, start, stop, previous, scale, refreshes[index], num_kept, known[horizon]))
    return steps


class HeadStep:
    """What the head computes at a denoising step."""

    FULL = "full"  # both halves, every block
    WARM = "warm-up"  # the conditional half; every block but the skipped ones
    REUSE = "reuse"  # the conditional half; no block


def make_head_plan(num_sampling_steps: int, policy: CachePolicy | None) -> list[str]:
    """The kind of each denoising step, in the order of use: from index `num_sampling_steps` - 1 down to 0."""

    def kind(index: int) -> str:
        if policy is None or not policy.head_cache:
            return HeadStep.FULL
        if index == num_sampling_steps - 1 or index % policy.head_refresh_interval == 0:
            return HeadStep.FULL
        return HeadStep.WARM if index > policy.head_warmup * num_sampling_steps else HeadStep.REUSE

    return [kind(index) for index in reversed(range(num_sampling_steps))]


def describe(steps: list[Step], num_rows: int) -> str:
    """A table of a plan, one line per step."""
    lines = ["step  kind     known  predicts    cfg  rows kept"]
    for step in steps:
        kind = "refresh" if step.refresh else "lazy"
        tokens = f"{step.start:5d}  {step.stop - step.start:8d}"
        share = f"{step.num_kept:4d} of {num_rows}"
        lines.append(f"{step.index:4d}  {kind:7s}  {tokens}  {step.cfg:5.2f}  {share}")
    return "\n".join(lines)
