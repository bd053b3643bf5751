"""Other methods that sample from MAR without training, and their compositions with LazyMAR.

A `Method` is what `--method` and its flags set: it makes a schedule, and adapts a cache policy to it. `METHODS` lists
the published methods; "+" composes them. Figures are from the papers and their code unless a comment says otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.schedule import NUM_TRAIN_STEPS, check_num_sampling_steps, respaced_timesteps
from diffusion.solver import SolverSteps
from models.lazymar.flops import Flops, plan_flops
from models.lazymar.noise import Noise
from models.lazymar.plan import Plan, make_plan
from models.lazymar.policy import REFERENCE_STEPS, CachePolicy, count_of
from models.lazymar.sampler import Sampler
from models.lazymar.schedule import (
    Chain,
    Schedule,
    ScheduledStep,
    cfg_scales,
    cosine_counts,
    counts_from_masked,
    given_counts,
)
from models.mar import MAR

# Annealed chains start here. The first denoising step divides by sqrt(alpha_bar), which is 1/13 at 950 and 1/642 at
# 998; a short chain would keep the error of that step.
ANNEALED_FIRST_TIMESTEP = 950
ANNEALINGS = ("linear", "cosine", "generation")
LAST_TIME = 1e-5  # at which the last autoregressive step ends, in eMIGM's code
TOKEN_SCHEDULES = ("cosine", "exp")
REFERENCE_DENOISING_STEPS = 100  # chain length that the head's refresh interval is given for


@dataclass(frozen=True)
class AnnealedSteps:
    """Denoising steps that decrease over the autoregressive steps (DiSA, arXiv 2505.20297).

    Every chain starts at timestep 950: up to one in twenty of the denoising steps are duplicates there and are dropped.

    Args:
        upper:    denoising steps at the first autoregressive step, 2 to 1000.
        lower:    denoising steps at the end, at least 2 and at most `upper`.
        schedule: "linear" or "cosine" from the first step to the last; "generation": linear up to the last stage of
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
            raise ValueError(f"num_sampling_steps must not increase, but {self.lower} is above {self.upper}")
        if self.schedule not in ANNEALINGS:
            raise ValueError(
                f"num_sampling_steps must be annealed by a schedule of {', '.join(ANNEALINGS)}, not {self.schedule!r}"
            )

    def __str__(self) -> str:
        return f"{self.upper}:{self.lower}:{self.schedule}"

    def at(self, step: int, num_iter: int, num_generating: int) -> int:
        """Return the denoising steps of an autoregressive step before duplicates are dropped.

        `num_generating` of the `num_iter` steps come before the last stage.
        """
        last, span = num_iter - 1, self.upper - self.lower
        if self.schedule == "generation":
            if step >= num_generating:
                return self.lower
            last = num_generating - 1
        if last == 0:
            return self.upper
        if self.schedule == "cosine":
            return self.lower + int((math.cos(math.pi * step / last) + 1) / 2 * span)
        return self.lower + int((last - step) / last * span)


@dataclass(frozen=True)
class DetailedTokens:
    """The tokens of the last stage whose conditions vary most across channels take a longer denoising chain (GtR).

    They never take fewer denoising steps than the other tokens. With `SolverSteps`, all tokens take the same chain.

    Args:
        share:              share of the tokens that a step predicts, in each image by itself.
        num_sampling_steps: their denoising steps.

    Raises ValueError for values out of range.
    """

    share: float = 0.1
    num_sampling_steps: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"detailed_tokens must be a share between 0 and 1, not {self.share}")
        check_num_sampling_steps(self.num_sampling_steps)

    def __str__(self) -> str:
        return f"{self.share:g}:{self.num_sampling_steps}"


class Order(NamedTuple):
    """How many tokens each step predicts, the stage of each position (None: one stage), and each stage's first step."""

    counts: list[int]
    stages: tuple[int, ...] | None = None
    stage_starts: Sequence[int] = (0,)


@dataclass(frozen=True)
class Method:
    """The settings that decide what sampling an image costs. The defaults are MAR's.

    Args:
        num_stages:          stages of the order of prediction; 1 is a random order, more halve a checkerboard.
        num_iter:            autoregressive steps; with several stages, a number for each.
        tokens_per_step:     tokens of each autoregressive step, in place of `num_iter` and `token_schedule`.
        token_schedule:      how many tokens are masked after each step: by MAR's "cosine"; or by "exp",
                             (1 - exp(-5 t)) / (1 - exp(-5)) of them at time t, which falls evenly from 1 to 1e-5
                             (eMIGM, arXiv 2503.07197), rounded.
        num_sampling_steps:  denoising steps.
        detailed_tokens:     tokens of the last stage that take more denoising steps.
        guidance_interval:   (t_min, t_max): steps that end at a time t with t_min < t <= t_max run with guidance, other
                             steps without; time as for `token_schedule`. None: all steps run with guidance.
        unguided_below:      steps whose CFG scale is below this run without guidance.
        lazy_sampling_steps: maximum number of denoising steps at steps that are not refresh steps.
        temperature:         scale of the noise of the denoising steps; with `SolverSteps`, of the initial noise.
        cache:               the cache policy. With several stages, and with the token schedule "exp", its start step
                             and refresh interval are given for 64 steps and scaled to the method's; with
                             `AnnealedSteps` its head's refresh interval is given for 100 denoising steps and scaled to
                             each chain; with `SolverSteps` its head cache is not used.

    Raises ValueError, naming the field, for a value out of range.
    """

    num_stages: int = 1
    num_iter: int | tuple[int, ...] = REFERENCE_STEPS
    tokens_per_step: tuple[int, ...] | None = None
    token_schedule: str = "cosine"
    num_sampling_steps: int | AnnealedSteps | SolverSteps = 100
    detailed_tokens: DetailedTokens | None = None
    guidance_interval: tuple[float, float] | None = None
    unguided_below: float = 1.0
    lazy_sampling_steps: int | None = None
    temperature: float = 1.0
    cache: CachePolicy | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_sampling_steps, int):
            check_num_sampling_steps(self.num_sampling_steps)
        t_min, t_max = self.guidance_interval or (0.0, 1.0)
        limits = {
            "num_stages": (self.num_stages >= 1, "at least 1"),
            "unguided_below": (self.unguided_below >= 1, "at least 1"),
            "lazy_sampling_steps": (self.lazy_sampling_steps is None or self.lazy_sampling_steps >= 2, "at least 2"),
            "token_schedule": (self.token_schedule in TOKEN_SCHEDULES, " or ".join(TOKEN_SCHEDULES)),
            "guidance_interval": (0 <= t_min < t_max <= 1, "t_min:t_max with 0 <= t_min < t_max <= 1, such as 0.1:0.3"),
        }
        for name, (valid, wanted) in limits.items():
            if not valid:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")
        if self.lazy_sampling_steps is not None and self.cache is None:
            raise ValueError("lazy_sampling_steps needs a method that caches: choose one, or leave it out")
        by_generation = getattr(self.num_sampling_steps, "schedule", None) == "generation"
        if self.num_stages == 1 and (self.detailed_tokens or by_generation):
            name = "detailed_tokens" if self.detailed_tokens else "num_sampling_steps by the schedule generation"
            raise ValueError(f"{name} needs several stages: give num_stages too, or leave it out")
        if self.num_stages > 1 and (one_stage := {"tokens_per_step", "token_schedule"} & self.changes.keys()):
            raise ValueError(f"{one_stage.pop()} is for an order without stages: leave it out, or set num_stages to 1")

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that differ from MAR's, by name."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def plan(self, model: MAR, *, cfg: float, cfg_schedule: str = "linear", known: Tensor | None = None) -> Plan:
        """Return the plan for a model, which may be on the meta device, over all tokens or those that are missing.

        `known`, a BoolTensor of L elements in row-major order, is True at tokens that are known from the start. The
        steps of a stage are then at most its missing tokens.

        Raises ValueError, naming a setting that does not fit.
        """
        positions = known_positions(known, model.seq_len)
        order = self._order(model.seq_len, positions)
        num_iter = len(order.counts)
        scales = [
            scale if scale >= self.unguided_below else 1.0 for scale in cfg_scales(order.counts, cfg, cfg_schedule)
        ]
        if self.guidance_interval is not None:
            t_min, t_max = self.guidance_interval
            scales = [scale if t_min < t <= t_max else 1.0 for scale, t in zip(scales, step_times(num_iter))]
        policy = self._policy(order)
        steps = []
        for index, scale in enumerate(scales):
            limit = NUM_TRAIN_STEPS
            if self.lazy_sampling_steps and policy and not policy.is_refresh(index, num_iter):
                limit = self.lazy_sampling_steps
            steps.append(ScheduledStep(scale, self._chains(index, order, limit)))
        schedule = Schedule(tuple(steps), order.stages, detail, positions, self.temperature)
        return make_plan(schedule, policy, buffer_size=model.buffer_size)

    def _order(self, seq_len: int, known: Sequence[int]) -> Order:
        num_iter = (self.num_iter,) if isinstance(self.num_iter, int) else self.num_iter
        if self.num_stages > 1:
            stages = stages_of_positions(seq_len, self.num_stages)
            sizes = [stages.count(stage) for stage in range(self.num_stages)]
            counts = staged_counts(sizes, num_iter)
            if known:
                there = [stages[position] for position in known]
                sizes = [size - there.count(stage) for stage, size in enumerate(sizes)]
                num_iter = tuple(map(min, num_iter, sizes))
                counts = staged_counts(sizes, num_iter)
            return Order(counts, tuple(stages), [sum(num_iter[:stage]) for stage in range(self.num_stages)])
        missing = seq_len - len(known)
        if self.tokens_per_step is not None:
            return Order(given_counts(missing, self.tokens_per_step))
        if len(num_iter) > 1:
            given = ",".join(map(str, num_iter))
            raise ValueError(f"num_iter must be one number for one stage, not {given}: or give num_stages too")
        num_steps = min(num_iter[0], missing) if known else num_iter[0]
        counts_of = exp_counts if self.token_schedule == "exp" else cosine_counts
        return Order(counts_of(missing, num_steps))

    def _chains(self, index: int, order: Order, limit: int) -> tuple[Chain, ...]:
        """Return the denoising chains of a step, of at most `limit` denoising steps where tokens are not detailed."""
        length, count, last_stage = self.num_sampling_steps, order.counts[index], order.stage_starts[-1]
        if isinstance(length, SolverSteps):
            solver = replace(length, evaluations=min(length.evaluations, limit))
            return (Chain(solver.timesteps, count, solver),)
        if isinstance(length, AnnealedSteps):
            length = length.at(index, len(order.counts), last_stage)
        length = min(length, limit)
        if self.detailed_tokens is None or index < last_stage:
            return (Chain(self._timesteps(length), count),)
        num_detailed = int(round(count * self.detailed_tokens.share, 6))
        longer = max(length, self.detailed_tokens.num_sampling_steps)
        chains = Chain(self._timesteps(longer), num_detailed), Chain(self._timesteps(length), count - num_detailed)
        return tuple(chain for chain in chains if chain.num_tokens)

    def _timesteps(self, length: int) -> tuple[int, ...]:
        """Return the timesteps of a chain, descending; annealed chains start at 950, and duplicates are dropped."""
        timesteps = respaced_timesteps(length)
        if isinstance(self.num_sampling_steps, AnnealedSteps):
            timesteps = sorted({min(timestep, ANNEALED_FIRST_TIMESTEP) for timestep in timesteps})
        return tuple(reversed(timesteps))

    def _policy(self, order: Order) -> CachePolicy | None:
        """Return the cache policy for this method's order.

        - With several stages, start step and refresh interval keep their place in the run, and each stage begins with a
          refresh step, because it predicts more tokens at once than the one before. No refresh is scheduled on the step
          just before that.
        - With the token schedule "exp" they keep their place in the run, too: published runs have as few as 16 steps.
        - Annealed chains are short: the head's refresh interval becomes a fraction of each chain.
        """
        policy, num_iter = self.cache, len(order.counts)
        if policy is None:
            return None
        if isinstance(self.num_sampling_steps, AnnealedSteps) and policy.head_refresh_interval >= 1:
            fraction = min(policy.head_refresh_interval / REFERENCE_DENOISING_STEPS, 0.999)
            policy = replace(policy, head_refresh_interval=fraction)
        is_mar_order = order.stages is None and self.token_schedule == "cosine"
        if is_mar_order or policy.refresh_steps is not None:
            return policy
        start, interval = policy.start_step, policy.refresh_interval
        start = count_of(start, num_iter) if start < 1 else math.ceil(start * num_iter / REFERENCE_STEPS)
        if interval > 1:  # some steps stay lazy
            interval = max(2, math.ceil(interval * num_iter / REFERENCE_STEPS))
        scaled = replace(policy, start_step=start, refresh_interval=interval)

        def is_refresh(step: int) -> bool:
            if step in order.stage_starts or step < start or interval == 1:
                return True
            is_last = step + 1 == num_iter  # a stage without missing tokens may start after it
            return scaled.is_refresh(step, num_iter) and (is_last or step + 1 not in order.stage_starts)

        return replace(policy, refresh_steps=tuple(filter(is_refresh, range(num_iter))))


def step_times(num_iter: int) -> list[float]:
    """Return the time at which each autoregressive step ends [num_iter]: from 1, where the first begins, to 1e-5."""
    return [1 - (1 - LAST_TIME) * step / num_iter for step in range(1, num_iter + 1)]


def exp_counts(num_tokens: int, num_iter: int) -> list[int]:
    """Return the number of tokens that each step predicts by the token schedule "exp", at least one per step."""
    masked = [math.expm1(-5 * time) / math.expm1(-5) for time in step_times(num_iter)[:-1]]
    return counts_from_masked(num_tokens, num_iter, [round(num_tokens * share) for share in masked])


def stages_of_positions(seq_len: int, num_stages: int) -> list[int]:
    """Return the stage at which each position of a square grid is predicted, 0 to `num_stages` - 1, row-major.

    The last stage is one half of a checkerboard: row + column is odd. The half of the other, on the same diagonals two
    apart, is the stage before, and so on (GtR, arXiv 2510.17171).

    Raises ValueError, naming num_stages, if the grid cannot be halved so often.
    """
    side = math.isqrt(seq_len)
    if side**2 != seq_len or num_stages > side or side % 2 ** (num_stages - 1):
        raise ValueError(
            f"num_stages must be such that 2^(num_stages - 1) divides the side of the token grid, "
            f"{math.sqrt(seq_len):g}, not {num_stages}"
        )
    period = 2 ** (num_stages - 1)
    diagonals = ((row + column) % period or period for row in range(side) for column in range(side))
    # The lowest bit that is set in a diagonal's number says how often it can be halved.
    return [num_stages - (diagonal & -diagonal).bit_length() for diagonal in diagonals]


def staged_counts(sizes: Sequence[int], num_iter: Sequence[int]) -> list[int]:
    """Return the tokens of each step, given each stage's size and steps: as even as whole numbers allow.

    Raises ValueError, naming num_iter, unless there is a number of steps for each stage, each with a token to predict.
    """
    if len(num_iter) != len(sizes):
        given = ",".join(map(str, num_iter))
        raise ValueError(f"num_iter must have a number of steps for each of the {len(sizes)} stages, not {given}")
    counts = []
    for size, steps in zip(sizes, num_iter):
        if not min(1, size) <= steps <= size:
            raise ValueError(f"num_iter must be 1 to {size} for a stage of {size} tokens, not {steps}")
        counts += [size * (step + 1) // steps - size * step // steps for step in range(steps)]
    return counts


def known_positions(known: Tensor | None, seq_len: int) -> tuple[int, ...]:
    """Return the positions, ascending, at which a mask of known tokens is True; none for None.

    Raises ValueError unless it is a BoolTensor of `seq_len` elements that leaves a token to predict.
    """
    if known is None:
        return ()
    if known.dtype != torch.bool or known.numel() != seq_len:
        raise ValueError(f"known must be a BoolTensor of {seq_len} tokens, not {known.dtype} {list(known.shape)}")
    if known.all():
        raise ValueError("known must leave at least one token to predict")
    return tuple(known.flatten().nonzero().flatten().tolist())


def detail(conditions: Tensor) -> Tensor:
    """Return how detailed tokens are [B, k], by the conditional branch's conditions [B, k, D].

    It is the amplitude of the frequencies n = 1 to D / 2 of a condition over its channels, summed with weights that
    grow from 1 to 2 (GtR, arXiv 2510.17171; frequency-weighted token selection).
    """
    amplitudes = torch.fft.rfft(conditions.to(torch.promote_types(conditions.dtype, torch.float32))).abs()[..., 1:]
    count = amplitudes.shape[-1]
    weights = 1 + torch.arange(1, count + 1, device=conditions.device, dtype=amplitudes.dtype) / count
    return (amplitudes * weights).sum(dim=-1)


LAZYMAR = Method(cache=CachePolicy())  # arXiv 2503.12450
DISA = Method(num_sampling_steps=AnnealedSteps(upper=50, lower=5))  # arXiv 2505.20297

# GtR, generation then reconstruction (arXiv 2510.17171): an independent implementation from second-hand facts, because
# no code is public. Our assumptions:
# - the steps of each stage, from the tokens per step that the paper is said to have (2.67, 10.67 and 64 of 256);
# - every chain begins at timestep 950, as in DiSA;
# - the tokens that take 50 denoising steps are chosen at each step, in each image by itself.
GTR = Method(
    num_stages=3,
    num_iter=(24, 6, 2),
    num_sampling_steps=AnnealedSteps(upper=50, lower=20, schedule="generation"),
    detailed_tokens=DetailedTokens(share=0.1, num_sampling_steps=50),
)

# ReCAP (arXiv 2505.19089): the first half of the steps in full, then every other one. The steps between compute only
# the tokens that they and the step before predict, and take 40 denoising steps. Unlike in the paper, the first decoder
# block sees the buffer as the lazy step's encoder computes it, which costs nothing.
RECAP = Method(
    lazy_sampling_steps=40,
    cache=CachePolicy(
        start_step=0.5,
        refresh_interval=2,
        prune_layer=0,
        recomputed_fractions=((0, 0.0),),
        min_margin=0,
        condition_cache=False,
        head_cache=False,
    ),
)

# LazyMAR at equal FLOPs with a third less error of the guidance direction, chosen by `util.condition_errors` on
# mar_tiny: both branches are computed at every third step, and fewer rows at the early steps pay for it.
LAZYFRESH = Method(
    cache=CachePolicy(
        start_step=1,
        recomputed_fractions=((0, 0.5), (30, 0.25), (40, 0.15)),
        condition_interval=3,
    )
)

# Guidance in a limited interval, known from diffusion models (arXiv 2404.07724); here of the autoregressive steps.
LATE_GUIDANCE = Method(unguided_below=1.1)

# Our own composition for people who just want images: GtR's order in 16 steps, the few-step solver, LazyMAR's first two
# caches, and no guidance where it matters little. docs/methods.md has the measurements, all of them on mar_tiny.
FAST = Method(
    num_stages=3,
    num_iter=(13, 2, 1),
    num_sampling_steps=SolverSteps(6),
    unguided_below=1.2,
    temperature=0.85,
    cache=CachePolicy(refresh_interval=18),
)

# eMIGM (arXiv 2503.07197): the settings published for its models, for 16 steps of 8 evaluations of the head. They
# depend on the model and the number of steps: see `emigm`. The CFG scale is 4 at all guided steps, as in its presets.
EMIGM = Method(
    num_iter=16,
    token_schedule="exp",
    num_sampling_steps=SolverSteps(8, "singlestep"),
    guidance_interval=(0.1, 0.3),
)
# The guidance intervals of 16 steps, and of 128 steps (64 for models of 512 pixels), where they are not these:
EMIGM_INTERVALS = {"emigm": ((0.1, 0.3), (0.18, 0.6)), "512": ((0.15, 0.35), (0.25, 0.5))}
EMIGM_INTERVALS |= {"emigm_base": ((0.1, 0.3), (0.05, 0.4)), "emigm_huge": ((0.2, 0.4), (0.3, 0.7))}


def emigm(model: str, num_iter: int = 16) -> Method:
    """Return eMIGM's published settings for a preset of its own; other models get those of eMIGM-S.

    Up to 32 steps get the settings published for 16 steps, more steps those published for 128 (512 pixels: 64).
    """
    few, many = EMIGM_INTERVALS.get("512" if model.endswith("_512") else model, EMIGM_INTERVALS["emigm"])
    if num_iter <= 32:
        return replace(EMIGM, num_iter=num_iter, guidance_interval=few)
    return replace(EMIGM, num_iter=num_iter, guidance_interval=many, num_sampling_steps=SolverSteps(14, "singlestep"))


METHODS = {
    "mar": Method(),
    "lazymar": LAZYMAR,
    "lazyfresh": LAZYFRESH,
    "disa": DISA,
    "gtr": GTR,
    "recap": RECAP,
    "lateguidance": LATE_GUIDANCE,
    "fast": FAST,
    "emigm": EMIGM,
}


def find_method(name: str, model: str = "", num_iter: int | tuple[int, ...] | None = None) -> Method:
    """Return the method of a name, or the composition of names joined by "+".

    `model`, the name of a preset, and the number of steps decide settings of "emigm" alone, see `emigm`.

    Raises ValueError, naming method, for an unknown name, and for methods that contradict each other.
    """
    names = [part.strip().lower() for part in name.split("+")]
    settings, decided_by = dict[str, Any](), dict[str, str]()
    for part in names:
        if part not in METHODS:
            raise ValueError(f"method {part!r} is unknown: choose from {', '.join(METHODS)}, or join several by +")
        method = emigm(model, num_iter if isinstance(num_iter, int) else 16) if part == "emigm" else METHODS[part]
        for setting, value in method.changes.items():
            if setting in decided_by:
                raise ValueError(
                    f"method {name} cannot be: {decided_by[setting]} and {part} both set {setting}; leave one out"
                )
            decided_by[setting] = part
            settings[setting] = value
    return Method(**settings)


def sample_tokens(
    model: MAR,
    class_labels: Tensor,
    *,
    noise: Noise | None = None,
    method: Method | str = "mar",
    cfg: float = 3.25,
    cfg_schedule: str = "linear",
    known: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """Sample one batch of latents [B, C, h, w] for classes [B].

    Args:
        method:       a `Method` or its name.
        cfg:          CFG scale, at least 1 (1: no guidance).
        cfg_schedule: "linear" grows towards `cfg` with the number of predicted tokens; "constant" does not.
        known:        for inpainting: latents [B, C, h, w] at unit variance, and a BoolTensor of L tokens in row-major
                      order, True where tokens are kept as they are. The other tokens are sampled, given these.
        settings:     fields of `Method` that replace the method's, such as `num_iter=32` or `temperature=0.9`.

    The other arguments, the result and the errors are those of `Sampler` and `Method.plan`.
    """
    latents, mask = known or (None, None)
    method = with_settings(model, method, settings)
    plan = method.plan(model, cfg=cfg, cfg_schedule=cfg_schedule, known=mask)
    return Sampler(model, plan)(class_labels, noise, known=latents if plan.schedule.known else None)


def count_flops(
    model: MAR,
    method: Method | str = "mar",
    *,
    cfg: float = 3.25,
    cfg_schedule: str = "linear",
    known: Tensor | None = None,
    **settings: Any,
) -> Flops:
    """Return the FLOPs of sampling one image. `model` may be on the meta device.

    The arguments are those of `sample_tokens`, but `known` is the mask of known tokens alone.
    """
    plan = with_settings(model, method, settings).plan(model, cfg=cfg, cfg_schedule=cfg_schedule, known=known)
    return plan_flops(model, plan)


def with_settings(model: MAR, method: Method | str, settings: Mapping[str, Any]) -> Method:
    """Return a method, given by itself or by its name, with other settings."""
    if isinstance(method, str):
        method = find_method(method, model.name, settings.get("num_iter"))
    return replace(method, **settings)
