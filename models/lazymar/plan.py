"""The plan of a run: every decision about what is computed at which step, taken before the first step.

That is possible because a run's order of prediction is drawn up front and the number of tokens per step follows from a
schedule. Whatever varies between methods is a field here; the loops that carry a plan out ask no policy.
`python -m models.lazymar` prints the plan of a run.

Tokens are counted in the order in which the run predicts them. Rows are the P buffer rows, then the L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import groupby

from models.lazymar.policy import CachePolicy

CFG_SCHEDULES = ("linear", "constant")


class DenoisingStep(Enum):
    """The kinds of denoising steps, by what the diffusion head computes."""

    REFRESH = "refresh"  # both branches, every block
    WARMUP = "warm-up"  # the conditional branch, every block but the skipped ones
    REUSE = "reuse"  # the conditional branch, no block


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """The diffusion head's part of an autoregressive step's plan; steps that do the same share one object.

    steps:          its denoising steps, in the order of use: from index S - 1 down to 0.
    skipped_blocks: residual blocks that only a refresh computes.
    num_branches:   2 under guidance, the conditional and the unconditional branch; else 1.
    """

    steps: tuple[DenoisingStep, ...]
    skipped_blocks: tuple[int, ...]
    num_branches: int

    @cached_property
    def stretches(self) -> list[tuple[DenoisingStep, int]]:
        """The denoising steps as runs of equal ones: each kind and how many of it follow one another."""
        return [(kind, len(list(steps))) for kind, steps in groupby(self.steps)]


@dataclass(frozen=True)
class Step:
    """The plan of one autoregressive step.

    index:         counted from 0.
    start, stop:   the tokens predicted now; those before `start` are known.
    previous:      the first token predicted at the previous step.
    cfg:           the CFG scale.
    refresh:       whether the policy has everything computed here; always True in the baseline.
    num_branches:  branches that the transformer computes: 2 for both, 1 for the conditional one.
    reuses_tokens: whether features of the tokens known before `previous` are taken from the token cache.
    num_kept:      rows that pass the prune layer.
    horizon:       the last block's output is computed for the tokens from `start` to here: beyond `stop` where steps
                   until the next refresh read it from the condition cache.
    head:          what the diffusion head computes.
    """

    index: int
    start: int
    stop: int
    previous: int
    cfg: float
    refresh: bool
    num_branches: int
    reuses_tokens: bool
    num_kept: int
    horizon: int
    head: HeadPlan

    @property
    def num_tokens(self) -> int:
        """The number of tokens predicted now."""
        return self.stop - self.start

    @property
    def new(self) -> slice:
        """The known tokens whose features are computed rather than reused."""
        return slice(self.previous if self.reuses_tokens else 0, self.start)

    @property
    def predicted(self) -> slice:
        """The tokens predicted now."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Plan:
    """The steps of a run, and what its caches hold.

    steps:         in order.
    num_rows:      P + L.
    num_branches:  2 under guidance, else 1.
    lazy_branches: branches that steps between refreshes compute, and that the token cache holds.
    prune_layer:   the decoder block whose attention is the last that sees every row; None without a token cache.
    selection:     the rule for which rows pass it, one of `SELECTIONS`.
    """

    steps: tuple[Step, ...]
    num_rows: int
    num_branches: int
    lazy_branches: int
    prune_layer: int | None
    selection: str

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def tokens_masked(seq_len: int, num_iter: int) -> list[int]:
    """Return how many tokens are masked before the first step and after each one: `num_iter` + 1 counts.

    This is MAR's cosine schedule, with at least one token predicted at every step.
    """
    masked = [seq_len]
    for step in range(num_iter - 1):
        wanted = math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter))
        masked.append(max(1, min(wanted, masked[-1] - 1)))
    return [*masked, 0]


def make_head_plan(num_sampling_steps: int, policy: CachePolicy | None, num_branches: int) -> HeadPlan:
    """Return the head's plan for `num_sampling_steps` denoising steps; without a policy every step is a refresh."""
    if policy is None or not policy.head_cache:
        return HeadPlan((DenoisingStep.REFRESH,) * num_sampling_steps, (), num_branches)

    def kind(index: int) -> DenoisingStep:
        if index == num_sampling_steps - 1 or index % policy.head_refresh_interval == 0:
            return DenoisingStep.REFRESH
        return DenoisingStep.WARMUP if index > policy.head_warmup * num_sampling_steps else DenoisingStep.REUSE

    return HeadPlan(
        tuple(kind(index) for index in reversed(range(num_sampling_steps))), policy.head_skipped_blocks, num_branches
    )


def make_plan(
    seq_len: int,
    buffer_size: int,
    *,
    num_iter: int,
    cfg: float,
    cfg_schedule: str = "linear",
    num_sampling_steps: int = 100,
    policy: CachePolicy | None,
) -> Plan:
    """Return the plan of a run over `seq_len` tokens behind `buffer_size` rows; without a policy, the baseline's.

    Raises ValueError, naming the setting, for one that is out of range.
    """
    if not 1 <= num_iter <= seq_len:
        raise ValueError(f"num_iter must be 1 to the number of tokens, {seq_len}, not {num_iter}")
    if not (math.isfinite(cfg) and cfg >= 1):
        raise ValueError(f"cfg must be a finite number of at least 1 (1: no guidance), not {cfg}")
    if cfg_schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule must be {' or '.join(CFG_SCHEDULES)}, not {cfg_schedule!r}")
    num_rows = buffer_size + seq_len
    known = [seq_len - masked for masked in tokens_masked(seq_len, num_iter)]
    num_branches = 1 if cfg == 1 else 2
    head = make_head_plan(num_sampling_steps, policy, num_branches)
    prune_layer = None
    if policy is None:  # every step is a refresh, and nothing is cached
        policy = CachePolicy(start_step=num_iter, token_cache=False, condition_cache=False)
    elif policy.token_cache:
        prune_layer = policy.prune_layer
    condition_cache = policy.condition_cache and num_branches == 2
    lazy_branches = 1 if condition_cache else num_branches
    refreshes = [policy.is_refresh(index) for index in range(num_iter)]

    steps = []
    for index, (start, stop) in enumerate(zip(known, known[1:])):
        refresh, previous = refreshes[index], known[max(index - 1, 0)]
        # The schedule counts one token as masked at the last step.
        scale = 1 + (cfg - 1) * min(stop, seq_len - 1) / seq_len if cfg_schedule == "linear" else cfg
        num_kept, horizon = num_rows, index + 1
        if policy.token_cache and not refresh:
            wanted = int(num_rows * policy.kept_fraction(index, num_iter))
            num_kept = min(num_rows, max(stop - previous + policy.min_margin, wanted))
        if condition_cache and refresh:
            while horizon < num_iter and not refreshes[horizon]:
                horizon += 1
        steps.append(
            Step(
                index=index,
                start=start,
                stop=stop,
                previous=previous,
                cfg=scale,
                refresh=refresh,
                num_branches=num_branches if refresh else lazy_branches,
                reuses_tokens=policy.token_cache and not refresh,
                num_kept=num_kept,
                horizon=known[horizon],
                head=head,
            )
        )
    return Plan(tuple(steps), num_rows, num_branches, lazy_branches, prune_layer, policy.selection)


def describe(plan: Plan) -> str:
    """Return a table of the plan, one line per step."""
    lines = ["step  kind     known  predicts    cfg  branches  rows kept"]
    for step in plan:
        kind = "refresh" if step.refresh else "lazy"
        tokens = f"{step.start:5d}  {step.num_tokens:8d}"
        share = f"{step.num_kept:4d} of {plan.num_rows}"
        lines.append(f"{step.index:4d}  {kind:7s}  {tokens}  {step.cfg:5.2f}  {step.num_branches:8d}  {share}")
    return "\n".join(lines)
