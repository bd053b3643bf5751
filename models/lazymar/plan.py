"""The plan says how much every step computes. A schedule and a cache policy decide it before the first step.

That is possible because the order of prediction is drawn up front and the number of tokens per step is known. The
plan says how many rows a step recomputes; which ones depends on the image. `print(plan)` shows a plan.

Tokens are numbered in order of prediction. Rows are the P buffer rows, which hold the class, then the L tokens.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from diffusion.solver import SolverSteps
from models.lazymar.policy import NO_CACHE, CachePolicy, count_of
from models.lazymar.schedule import Schedule, ScheduledStep


class DenoisingKind(Enum):
    """What the diffusion head computes in a denoising step."""

    FULL = "full"  # every block, in both branches where there is guidance
    WARMUP = "warm-up"  # the conditional branch, every block but the skipped ones
    REUSE = "reuse"  # the conditional branch; of the blocks only the gates


@dataclass(frozen=True)
class HeadPlan:
    """A denoising chain of the diffusion head.

    kinds:          what each denoising step computes, from index S - 1 down to 0.
    timesteps:      the timestep of each, of the 1000 of training.
    skipped_blocks: residual blocks that only full steps compute.
    num_branches:   2 with guidance, the conditional and the unconditional branch; 1 without.
    solver:         combines the denoising steps; None: they are ancestral.
    """

    kinds: tuple[DenoisingKind, ...]
    timesteps: tuple[float, ...]
    skipped_blocks: tuple[int, ...]
    num_branches: int
    solver: SolverSteps | None = None

    @property
    def num_draws(self) -> int:
        """Noise draws per token: one where denoising starts, and one for each ancestral step."""
        return 1 if self.solver else 1 + len(self.kinds)


@dataclass(frozen=True)
class Step:
    """The plan of one autoregressive step.

    index:                from 0.
    start, stop:          range of the tokens predicted now; the tokens before `start` are known.
    previous_start:       first token predicted at the previous step; at a step that computes both branches, at the last
                          one that did. Tokens from there on are new to at least one branch.
    cfg:                  CFG scale; 1 at a step without guidance.
    refresh:              True if the transformer computes all rows in each branch it runs; always True in the baseline.
    transformer_branches: branches that the transformer computes: 2, or the conditional one alone.
    reuses_tokens:        True if features of tokens before `previous_start` are read from the token cache.
    num_recomputed:       rows that are recomputed from the prune layer's attention on.
    output_stop:          end of the token range whose decoder output this step computes: `stop`, or further where the
                          output fills the condition cache.
    head_plans:           denoising chains, each with the number of tokens that take it; see `Schedule`.
    """

    index: int
    start: int
    stop: int
    previous_start: int
    cfg: float
    refresh: bool
    transformer_branches: int
    reuses_tokens: bool
    num_recomputed: int
    output_stop: int
    head_plans: tuple[tuple[HeadPlan, int], ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens predicted now."""
        return self.stop - self.start

    @property
    def encoded(self) -> slice:
        """The known tokens that pass through the encoder; the features of the others are read from the token cache."""
        return slice(self.previous_start if self.reuses_tokens else 0, self.start)

    @property
    def predicted(self) -> slice:
        """The tokens predicted now."""
        return slice(self.start, self.stop)

    @property
    def num_draws(self) -> int:
        """Noise draws per token, of the chain that needs most."""
        return max(head.num_draws for head, _ in self.head_plans)


@dataclass(frozen=True)
class Plan:
    """The steps, in order.

    num_rows:      P + L.
    max_branches:  2 if any step is guided, else 1.
    lazy_branches: maximum number of branches that lazy steps compute; the token cache holds as many.
    policy:        the cache policy; the baseline's caches nothing, and without guidance there is no condition cache.
    schedule:      the schedule.
    """

    steps: tuple[Step, ...]
    num_rows: int
    max_branches: int
    lazy_branches: int
    policy: CachePolicy
    schedule: Schedule

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def distinct_head_plans(self) -> list[HeadPlan]:
        """The distinct plans of the diffusion head."""
        return list(dict.fromkeys(head for step in self for head, _ in step.head_plans))

    def __str__(self) -> str:
        lines = ["step  kind     known  predicts    cfg  branches  recomputes   denoising steps"]
        for step in self:
            kind = "refresh" if step.refresh else "lazy"
            chains = [str(len(head.kinds)) for head, _ in step.head_plans]
            if len(chains) > 1:
                chains = [f"{chain} for {count} tokens" for chain, (_, count) in zip(chains, step.head_plans)]
            lines.append(
                f"{step.index:4d}  {kind:7s}  {step.start:5d}  {step.num_tokens:8d}  {step.cfg:5.2f}  "
                f"{step.transformer_branches:8d}  {step.num_recomputed:4d} of {self.num_rows}   {', '.join(chains)}"
            )
        return "\n".join(lines)


def make_plan(schedule: Schedule, policy: CachePolicy | None = None, *, buffer_size: int) -> Plan:
    """Combine a schedule with a cache policy. Without a policy the plan is the baseline: everything is computed."""
    policy = policy or NO_CACHE
    num_iter, num_rows = len(schedule.steps), buffer_size + schedule.seq_len
    num_known = [*itertools.accumulate((step.num_tokens for step in schedule.steps), initial=len(schedule.known))]
    max_branches = 2 if any(step.cfg > 1 for step in schedule.steps) else 1
    if max_branches == 1:  # there is no difference between branches
        policy = replace(policy, condition_cache=False)
    lazy_branches = 1 if policy.condition_cache and policy.condition_interval is None else max_branches
    reuses_features = policy.token_cache or policy.condition_cache
    refreshes = [index for index in range(num_iter) if not reuses_features or policy.is_refresh(index, num_iter)]
    # The steps that may compute both branches; with a condition cache, these fill it.
    both = [index for index in range(num_iter) if not policy.condition_cache or policy.computes_both(index, num_iter)]

    steps: list[Step] = []
    for index, scheduled in enumerate(schedule.steps):
        refresh, next_both = index in refreshes, _first_after(index, both, num_iter)
        # The unconditional branch is needed if this step is guided, or a later one that reads what this one stores:
        # features of a refresh step until the next one, the difference of a lazy step until the next step in `both`.
        read_until = _first_after(index, both if policy.condition_cache and not refresh else refreshes, num_iter)
        is_needed = any(step.cfg > 1 for step in schedule.steps[index:read_until])
        branches = max_branches if is_needed and index in both else 1
        # The last step that computed these branches. Tokens predicted from there on are new to at least one of them.
        last_with_branches = max((step.index for step in steps if step.transformer_branches >= branches), default=0)
        start, stop, previous_start = num_known[index], num_known[index + 1], num_known[last_with_branches]
        output_stop = num_known[next_both] if policy.condition_cache and branches == 2 else stop
        reuses_tokens, num_recomputed = policy.token_cache and not refresh, num_rows
        if reuses_tokens:
            num_recomputed = policy.rows_recomputed(index, num_iter, num_rows, num_always=output_stop - previous_start)
        step = Step(
            index=index,
            start=start,
            stop=stop,
            previous_start=previous_start,
            cfg=scheduled.cfg,
            refresh=refresh,
            transformer_branches=branches,
            reuses_tokens=reuses_tokens,
            num_recomputed=num_recomputed,
            output_stop=output_stop,
            head_plans=plan_head(scheduled, policy),
        )
        steps.append(step)
    return Plan(tuple(steps), num_rows, max_branches, lazy_branches, policy, schedule)


def _first_after(index: int, steps: list[int], num_iter: int) -> int:
    return next((step for step in steps if step > index), num_iter)


def plan_head(scheduled: ScheduledStep, policy: CachePolicy) -> tuple[tuple[HeadPlan, int], ...]:
    """Return the head's plan for each denoising chain of a step. Without the head cache all steps are full.

    A solver has no head cache: its evaluations are so far apart that nothing is left to reuse.
    """

    def kind(index: int, num_steps: int) -> DenoisingKind:
        interval = max(1, count_of(policy.head_refresh_interval, num_steps))
        if index == num_steps - 1 or index % interval == 0:
            return DenoisingKind.FULL
        return DenoisingKind.WARMUP if index > policy.head_warmup * num_steps else DenoisingKind.REUSE

    chains = []
    for timesteps, num_tokens, solver in scheduled.chains:
        kinds, skipped = (DenoisingKind.FULL,) * len(timesteps), tuple[int, ...]()
        if policy.head_cache and solver is None:
            kinds = tuple(kind(index, len(timesteps)) for index in reversed(range(len(timesteps))))
            skipped = policy.head_skipped_blocks
        head = HeadPlan(kinds, timesteps, skipped, num_branches=2 if scheduled.cfg > 1 else 1, solver=solver)
        chains.append((head, num_tokens))
    return tuple(chains)
