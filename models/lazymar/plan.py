"""The plan of a run: every decision about what is computed at which step, taken before the first step.

That is possible because a run's order of prediction is drawn up front and the number of tokens per step follows from a
schedule. Whatever varies between methods is a field here; the loops that carry a plan out know no method and ask no
policy. `python -m models.lazymar` prints the plan of a run.

Tokens are counted in the order in which the run predicts them. Rows are the P buffer rows, then the L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property, partial
from itertools import groupby

from models.lazymar.methods import Method
from models.lazymar.policy import REFERENCE_DENOISING_STEPS, CachePolicy
from models.lazymar.schedules import chain_timesteps, spread_evenly, stages_of_positions, tokens_masked

CFG_SCHEDULES = ("linear", "constant")
BASELINE = Method()  # MAR in full


class DenoisingStep(Enum):
    """The kinds of denoising steps, by what the diffusion head computes."""

    REFRESH = "refresh"  # both branches, every block
    WARMUP = "warm-up"  # the conditional branch, every block but the skipped ones
    REUSE = "reuse"  # the conditional branch, no block


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """The diffusion head's part of an autoregressive step's plan; steps that do the same share one object.

    steps:          its denoising steps, in the order of use: from index S - 1 down to 0.
    timesteps:      the timestep of each, of the 1000 that the head was trained with.
    skipped_blocks: residual blocks that only a refresh computes.
    num_branches:   2 under guidance, the conditional and the unconditional branch; else 1.
    """

    steps: tuple[DenoisingStep, ...]
    timesteps: tuple[int, ...]
    skipped_blocks: tuple[int, ...]
    num_branches: int

    @cached_property
    def stretches(self) -> list[tuple[DenoisingStep, int]]:
        """The denoising steps as runs of equal ones: each kind and how many of it follow one another."""
        return [(kind, len(list(steps))) for kind, steps in groupby(self.steps)]


@dataclass(frozen=True)
class Step:
    """The plan of one autoregressive step.

    index, stage:  counted from 0.
    start, stop:   the tokens predicted now; those before `start` are known.
    previous:      the first token predicted at the previous step.
    cfg:           the CFG scale; 1 at a step without guidance.
    refresh:       whether the policy has everything computed here; always True in the baseline.
    num_branches:  branches that the transformer computes: 2 for both, 1 for the conditional one.
    reuses_tokens: whether features of the tokens known before `previous` are taken from the token cache.
    num_kept:      rows that pass the prune layer.
    horizon:       the last block's output is computed for the tokens from `start` to here: beyond `stop` where steps
                   until the next refresh read it from the condition cache.
    head:          what the diffusion head computes, for each token but the detailed ones.
    detailed_head: what it computes for these.
    num_detailed:  how many of the tokens predicted now, in each image, are detailed ones.
    """

    index: int
    stage: int
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
    detailed_head: HeadPlan
    num_detailed: int

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

    @property
    def chains(self) -> list[tuple[HeadPlan, int]]:
        """The chains of denoising steps, and how many of an image's tokens predicted now take each; first the detailed.

        Chains for no token are left out.
        """
        chains = [(self.detailed_head, self.num_detailed), (self.head, self.num_tokens - self.num_detailed)]
        return [(head, count) for head, count in chains if count]

    @property
    def num_draws(self) -> int:
        """The draws of noise that each token takes at most: where denoising starts, and one for each denoising step."""
        return 1 + max(len(head.steps) for head, _ in self.chains)


@dataclass(frozen=True)
class Plan:
    """The steps of a run, and what its caches hold.

    steps:         in order.
    num_rows:      P + L.
    num_branches:  2 under guidance, else 1.
    lazy_branches: branches that steps between refreshes compute, and that the token cache holds.
    prune_layer:   the decoder block whose attention is the last that sees every row; None without a token cache.
    selection:     the rule for which rows pass it, one of `SELECTIONS`.
    stages:        the stage at which each position is predicted; positions of one stage come in random order.
    """

    steps: tuple[Step, ...]
    num_rows: int
    num_branches: int
    lazy_branches: int
    prune_layer: int | None
    selection: str
    stages: tuple[int, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def heads(self) -> list[HeadPlan]:
        """The different plans that the diffusion head has."""
        return list(dict.fromkeys(head for step in self for head, _ in step.chains))

    @property
    def head_evaluations(self) -> int:
        """The evaluations of the head that follow one another: each denoising step of each chain of each step."""
        return sum(len(head.steps) for step in self for head, _ in step.chains)


def make_head_plan(
    timesteps: tuple[int, ...], num_branches: int, *, policy: CachePolicy, is_annealed: bool
) -> HeadPlan:
    """Return the head's plan for a chain of denoising steps; without the head cache every step is a refresh."""
    num_steps = len(timesteps)
    if not policy.head_cache:
        return HeadPlan((DenoisingStep.REFRESH,) * num_steps, timesteps, (), num_branches)
    refresh_interval = policy.head_refresh_interval
    if is_annealed:  # what is reused over as many steps of a short chain would be far off
        refresh_interval = math.ceil(refresh_interval * num_steps / REFERENCE_DENOISING_STEPS)

    def kind(index: int) -> DenoisingStep:
        if index == num_steps - 1 or index % refresh_interval == 0:
            return DenoisingStep.REFRESH
        return DenoisingStep.WARMUP if index > policy.head_warmup * num_steps else DenoisingStep.REUSE

    kinds = tuple(kind(index) for index in reversed(range(num_steps)))
    return HeadPlan(kinds, timesteps, policy.head_skipped_blocks, num_branches)


@dataclass(frozen=True)
class Order:
    """What is decided about the order of prediction: all but what an image's seed decides.

    known:        tokens that are known before the first step and after each one.
    stages:       the stage at which each position is predicted, row-major.
    stage_starts: the first step of each stage.
    """

    known: list[int]
    stages: tuple[int, ...]
    stage_starts: list[int]

    @property
    def num_iter(self) -> int:
        """The number of steps."""
        return len(self.known) - 1

    @classmethod
    def of(cls, method: Method, seq_len: int) -> Order:
        """Return a method's. Raises ValueError, naming the setting, if it does not fit the number of tokens."""
        steps = (method.num_iter,) if isinstance(method.num_iter, int) else method.num_iter
        if method.num_stages == 1:
            if len(steps) > 1:
                given = ",".join(map(str, steps))
                raise ValueError(f"num_iter must be one number for one stage, not {given}: or give num_stages, too")
            if not 1 <= steps[0] <= seq_len:
                raise ValueError(f"num_iter must be 1 to the number of tokens, {seq_len}, not {steps[0]}")
            return cls([seq_len - masked for masked in tokens_masked(seq_len, steps[0])], (0,) * seq_len, [0])
        stages = stages_of_positions(seq_len, method.num_stages)
        known = spread_evenly([stages.count(stage) for stage in range(method.num_stages)], steps)
        return cls(known, tuple(stages), [sum(steps[:stage]) for stage in range(method.num_stages)])


def refresh_steps(order: Order, policy: CachePolicy) -> list[bool]:
    """Return, for each step, whether it is a refresh, by a policy `of_run`.

    A stage predicts more tokens at once than the one before, and begins with a refresh. Just before it none is due,
    unless there are no lazy steps at that point of the run.
    """

    def is_refresh(step: int) -> bool:
        if step in order.stage_starts or step < policy.start_step or policy.refresh_interval == 1:
            return True
        is_due = (step - policy.start_step) % policy.refresh_interval == 0
        return is_due and step + 1 not in order.stage_starts

    return [is_refresh(step) for step in range(order.num_iter)]


def cfg_scales(order: Order, method: Method, cfg: float, cfg_schedule: str) -> list[float]:
    """Return the CFG scale of each step; 1 where a method leaves guidance out."""
    scales = [cfg] * order.num_iter
    if cfg_schedule == "linear":  # the schedule counts one token as masked at the last step
        seq_len = order.known[-1]
        scales = [1 + (cfg - 1) * min(stop, seq_len - 1) / seq_len for stop in order.known[1:]]
    return [scale if scale >= method.unguided_below else 1.0 for scale in scales]


def make_plan(
    seq_len: int, buffer_size: int, method: Method = BASELINE, *, cfg: float, cfg_schedule: str = "linear"
) -> Plan:
    """Return a method's plan of a run over `seq_len` tokens behind `buffer_size` rows.

    Raises ValueError, naming the setting, for one that is out of range.
    """
    if not (math.isfinite(cfg) and cfg >= 1):
        raise ValueError(f"cfg must be a finite number of at least 1 (1: no guidance), not {cfg}")
    if cfg_schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule must be {' or '.join(CFG_SCHEDULES)}, not {cfg_schedule!r}")
    order = Order.of(method, seq_len)
    known, num_iter, last_stage = order.known, order.num_iter, order.stage_starts[-1]
    num_rows, num_branches = buffer_size + seq_len, 1 if cfg == 1 else 2
    policy = CachePolicy(num_iter, token_cache=False, condition_cache=False, head_cache=False)  # caches nothing
    if method.cache:
        policy = method.cache.of_run(num_iter, has_stages=method.num_stages > 1)
    condition_cache = policy.condition_cache and num_branches == 2
    lazy_branches = 1 if condition_cache else num_branches
    refreshes = refresh_steps(order, policy)
    scales = cfg_scales(order, method, cfg, cfg_schedule)
    num_sampling_steps = method.denoising_steps(num_iter, last_stage)
    # Steps that do the same share one object.
    head_plan = cache(partial(make_head_plan, policy=policy, is_annealed=method.is_annealed))

    def head(count: int, scale: float) -> HeadPlan:
        return head_plan(chain_timesteps(count, method.first_timestep), 1 if scale == 1 else 2)

    steps = []
    for index, (start, stop) in enumerate(zip(known, known[1:])):
        refresh, previous = refreshes[index], known[max(index - 1, 0)]
        next_refresh = index + 1
        if policy.token_cache or condition_cache:
            next_refresh = next((step for step in range(index + 1, num_iter) if refreshes[step]), num_iter)
        # The unconditional branch is computed for the steps that follow, too, which read what it stores.
        is_guided = any(scale > 1 for scale in scales[index:next_refresh])
        num_kept, horizon = num_rows, stop
        if policy.token_cache and not refresh:
            wanted = int(num_rows * policy.kept_fraction(index, num_iter))
            num_kept = min(num_rows, max(stop - previous + policy.min_margin, wanted))
        if condition_cache and refresh and is_guided:
            horizon = known[next_refresh]
        count = num_sampling_steps[index]
        if policy.lazy_sampling_steps is not None and not refresh:
            count = min(count, policy.lazy_sampling_steps)
        detailed = method.detailed_tokens if index >= last_stage else None
        detailed_count = max(count, detailed.num_sampling_steps) if detailed else count
        steps.append(
            Step(
                index=index,
                stage=sum(index >= first for first in order.stage_starts) - 1,
                start=start,
                stop=stop,
                previous=previous,
                cfg=scales[index],
                refresh=refresh,
                num_branches=(num_branches if refresh else lazy_branches) if is_guided else 1,
                reuses_tokens=policy.token_cache and not refresh,
                num_kept=num_kept,
                horizon=horizon,
                head=head(count, scales[index]),
                detailed_head=head(detailed_count, scales[index]),
                num_detailed=int(round((stop - start) * detailed.share, 6)) if detailed else 0,
            )
        )
    prune_layer = policy.prune_layer if policy.token_cache else None
    return Plan(tuple(steps), num_rows, num_branches, lazy_branches, prune_layer, policy.selection, order.stages)


def describe(plan: Plan) -> str:
    """Return a table of the plan, one line per step."""
    lines = ["step  kind     stage  known  predicts    cfg  branches  rows kept   denoising steps"]
    for step in plan:
        kind = "refresh" if step.refresh else "lazy"
        tokens = f"{step.stage:5d}  {step.start:5d}  {step.num_tokens:8d}"
        share = f"{step.num_kept:4d} of {plan.num_rows}"
        denoising = f"{len(step.head.steps):4d}"
        if step.num_detailed:
            denoising += f", and {len(step.detailed_head.steps)} for {step.num_detailed} tokens"
        line = f"{step.index:4d}  {kind:7s}  {tokens}  {step.cfg:5.2f}  {step.num_branches:8d}  {share}  {denoising}"
        lines.append(line)
    return "\n".join(lines)
