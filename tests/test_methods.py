"""Methods and their compositions: each computes what `naive.py` defines, and is declared as it was published."""

from __future__ import annotations

import math
from dataclasses import replace

import naive
import pytest
import torch
from tools import GUIDANCE, LABELS, MODEL, SMALL, make_sampler, random_model, relative_error
from torch import Tensor

from models import (
    MAR,
    METHODS,
    AnnealedSteps,
    CachePolicy,
    DetailedTokens,
    ImageNoise,
    Method,
    create_model,
    find_method,
    sample_tokens,
)
from models.lazymar.plan import DenoisingStep, Plan

# What fits a run of 9 or 10 steps, in place of what the methods have for 64 or 32.
SHORT = {
    "mar": {"num_iter": 9, "num_sampling_steps": 9},
    "lazymar": {"cache": CachePolicy(start_step=2, refresh_interval=4)},
    "disa": {"num_sampling_steps": AnnealedSteps(12, 3)},
    "gtr": {
        "num_stages": 3,
        "num_iter": (5, 3, 2),
        "num_sampling_steps": AnnealedSteps(12, 5, "generation"),
        "detailed_tokens": DetailedTokens(0.2, 9),
    },
    "recap": {"cache": METHODS["recap"].cache, "lazy_sampling_steps": 6},
    "lateguidance": {"unguided_below": 1.4},
}
SHORT["fast"] = SHORT["gtr"] | {"unguided_below": 1.4, "cache": CachePolicy(start_step=2, refresh_interval=4)}


def short_settings(name: str) -> dict:
    """A method's settings, or a composition's, for a short run."""
    settings = dict(SHORT["mar"])
    for part in name.split("+"):
        settings |= SHORT[part]
    if "num_stages" in settings and "cache" in settings:  # whose steps are then those of 64, not of 10
        policy = settings["cache"]
        scaled = {"refresh_interval": 6 * policy.refresh_interval}
        if policy.start_step >= 1:
            scaled["start_step"] = 6 * policy.start_step
        settings["cache"] = replace(policy, **scaled)
    return settings


def sample_short(name: str, noise: ImageNoise, **changes) -> Tensor:
    settings = {**GUIDANCE, **short_settings(name), **changes}
    return sample_tokens(MODEL, LABELS[:1], method=name, **settings, noise=noise)


def assert_equal_to_naive(name: str, batch: int = 1, model: MAR = MODEL, **changes) -> None:
    settings = {**GUIDANCE, **short_settings(name), **changes}
    sampler = make_sampler(model, name, **settings)
    noise = sampler.noise(5, range(batch))
    result = sampler(LABELS[:batch], noise)
    expected = naive.sample_tokens(model, LABELS[:batch], **settings, noise=noise)
    assert result.isfinite().all() and relative_error(result, expected) < 1e-9


# Against the definition

COMPOSITIONS = [
    "disa",
    "gtr",
    "recap",
    "lateguidance",
    "fast",
    "lazymar+disa",
    "lazymar+gtr",
    "lazymar+lateguidance",
    "recap+gtr",
    "disa+recap+lateguidance",
    "lazymar+gtr+lateguidance",
]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_methods_and_compositions(name: str) -> None:
    assert_equal_to_naive(name)


@pytest.mark.parametrize("name", ["gtr", "lazymar+gtr+lateguidance", "disa+recap"])
@pytest.mark.parametrize("changes", [{}, {"cfg": 1.0}, {"cfg_schedule": "constant"}], ids=str)
def test_several_images_with_any_guidance(name: str, changes: dict) -> None:
    if "gtr" in name:
        changes = {**changes, "num_iter": (3, 2, 2)}
    assert_equal_to_naive(name, batch=3, model=SMALL, **changes)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "two-stage", "constant"])
@pytest.mark.parametrize("num_iter", [1, 8])
def test_annealing_schedules(schedule: str, num_iter: int) -> None:
    steps = AnnealedSteps(11, 2, schedule)
    assert_equal_to_naive("disa", model=SMALL, num_iter=num_iter, num_sampling_steps=steps)


GTR_CHANGES = [
    {"num_stages": 2, "num_iter": (4, 3)},
    {"num_stages": 2, "num_iter": (1, 1)},
    {"num_stages": 4, "num_iter": (2, 1, 3, 2)},
    {"num_iter": (4, 1, 3)},
    {"detailed_tokens": None},
    {"detailed_tokens": DetailedTokens(0.9, 2)},  # which take as many as all others
    {"detailed_tokens": DetailedTokens(0.01, 9)},  # of none
    {"detailed_tokens": DetailedTokens(0.3, 5)},  # as all others
    {"num_sampling_steps": 8},
    {"num_sampling_steps": 12},
    {"num_sampling_steps": AnnealedSteps(10, 4, "cosine")},
]


@pytest.mark.parametrize("changes", GTR_CHANGES, ids=str)
def test_stages_and_detailed_tokens(changes: dict) -> None:
    model = MODEL if changes.get("num_stages") == 4 else SMALL  # whose side cannot be halved so often
    assert_equal_to_naive("gtr", model=model, **{"num_iter": (3, 2, 2), **changes})


UNGUIDED_CACHES = [
    # Both branches of the token cache have to be there at the first guided step, which may be a lazy one.
    {"condition_cache": False, "selection": "random"},
    {"condition_cache": False, "prune_layer": 1, "min_margin": 0, "kept_fractions": ((0, 0.0),)},
    {"token_cache": False},
    {"token_cache": False, "condition_cache": False},
    {"selection": "random"},
]


@pytest.mark.parametrize("fields", UNGUIDED_CACHES, ids=str)
@pytest.mark.parametrize("unguided_below", [1.15, 1.6])  # steps 0 and 1 of 9, before the start step; steps 0 to 5
def test_caches_switched_off_under_late_guidance(fields: dict, unguided_below: float) -> None:
    policy = CachePolicy(start_step=2, refresh_interval=5, **fields)
    assert_equal_to_naive("lateguidance", model=SMALL, cache=policy, unguided_below=unguided_below)


@pytest.mark.parametrize("unguided_below", [2.5, 2.6, math.inf])
@pytest.mark.parametrize("cfg_schedule", ["linear", "constant"])
def test_guidance_that_never_or_hardly_begins(cfg_schedule: str, unguided_below: float) -> None:
    changes = {"cfg_schedule": cfg_schedule, "unguided_below": unguided_below}
    assert_equal_to_naive("lazymar+lateguidance", model=SMALL, **changes)


@pytest.mark.parametrize("num_sampling_steps", [2, 3, 5, 7, 8, 15, AnnealedSteps(5, 2), AnnealedSteps(24, 20)], ids=str)
def test_the_head_cache_on_chains_of_any_length(num_sampling_steps: int | AnnealedSteps) -> None:
    assert_equal_to_naive("lazymar", model=SMALL, num_iter=5, num_sampling_steps=num_sampling_steps)


@pytest.mark.parametrize("most", [2, 5, 100])
@pytest.mark.parametrize("num_sampling_steps", [7, AnnealedSteps(9, 3)], ids=str)
def test_shorter_chains_at_lazy_steps(num_sampling_steps: int | AnnealedSteps, most: int) -> None:
    policy = CachePolicy(start_step=2, refresh_interval=4)
    settings = {"cache": policy, "num_sampling_steps": num_sampling_steps, "lazy_sampling_steps": most}
    assert_equal_to_naive("lazymar", model=SMALL, **settings)


# Comparisons that mistakes do not survive

MISTAKES = [
    ("disa", {"num_sampling_steps": AnnealedSteps(12, 3, "cosine")}),
    ("disa", {"num_sampling_steps": AnnealedSteps(13, 3)}),
    ("disa", {"num_sampling_steps": AnnealedSteps(12, 4)}),
    ("gtr", {"num_stages": 1, "num_iter": 10, "num_sampling_steps": AnnealedSteps(12, 5), "detailed_tokens": None}),
    ("gtr", {"num_iter": (5, 2, 3)}),
    ("gtr", {"num_sampling_steps": AnnealedSteps(12, 5)}),
    ("gtr", {"detailed_tokens": None}),
    ("gtr", {"detailed_tokens": DetailedTokens(0.3, 9)}),
    ("gtr", {"detailed_tokens": DetailedTokens(0.2, 10)}),
    ("recap", {"lazy_sampling_steps": 7}),
    ("recap", {"cache": replace(METHODS["recap"].cache, min_margin=1)}),
    ("recap", {"cache": replace(METHODS["recap"].cache, prune_layer=1)}),
    ("recap", {"cache": replace(METHODS["recap"].cache, start_step=6)}),
    ("lateguidance", {"unguided_below": 1.2}),
]


@pytest.mark.parametrize(("name", "changes"), MISTAKES, ids=str)
def test_mistakes_in_the_settings_are_seen(name: str, changes: dict) -> None:
    noise = ImageNoise(MODEL, 5, [0], 13)
    assert relative_error(sample_short(name, noise, **changes), sample_short(name, noise)) > 1e-7


def test_chains_from_the_last_timestep_would_be_seen(monkeypatch) -> None:
    noise = ImageNoise(MODEL, 5, [0], 13)
    expected = sample_short("disa", noise)
    monkeypatch.setattr("models.methods.ANNEALED_FIRST_TIMESTEP", 999)
    assert relative_error(sample_short("disa", noise), expected) > 1e-7


# Orders and noise


@pytest.mark.parametrize("name", ["disa", "lazymar+gtr", "disa+recap+lateguidance"])
def test_images_do_not_depend_on_their_batch(name: str) -> None:
    indices = [40, 7, 19]
    sampler = make_sampler(MODEL, name, **GUIDANCE, **short_settings(name))

    def sample(places: list[int]) -> Tensor:
        return sampler(LABELS[places], sampler.noise(3, [indices[place] for place in places]))

    together = sample([0, 1, 2])
    for places in ([0], [1], [2], [2, 0]):
        assert relative_error(sample(places), together[places]) < 1e-9


def test_orders_by_stages_depend_on_the_seed_alone() -> None:
    sampler = make_sampler(MODEL, "gtr", **short_settings("gtr"))

    def positions(indices: list[int]) -> list[list[int]]:
        next(sampler.steps(LABELS[: len(indices)], sampler.noise(3, indices), sampler.empty_latents(len(indices))))
        return sampler.state.transformer.positions[: len(indices)].tolist()

    together = positions([40, 7, 19])
    assert together[2] == positions([19])[0] and together[1:] == positions([7, 19])
    assert together[0] != together[1]
    for order, found in zip(sampler.noise(3, [40, 7, 19]).orders.tolist(), together):
        assert found == [position for step in naive.by_stages(order, (5, 3, 2), 8) for position in step]


class MoreDraws:
    """Another source's noise, and draws without values after it."""

    def __init__(self, noise: ImageNoise) -> None:
        self.noise, self.orders = noise, noise.orders

    def draw(self, step: int, num_tokens: int) -> Tensor:
        drawn = self.noise.draw(step, num_tokens)
        return torch.cat([drawn, torch.full_like(drawn, math.nan)])


@pytest.mark.parametrize("name", ["mar", "disa", "lazymar+gtr", "recap", "fast"])
def test_draws_that_no_step_needs_are_left(name: str) -> None:
    sampler = make_sampler(MODEL, name, **GUIDANCE, **short_settings(name))
    noise = sampler.noise(3, range(2))
    assert torch.equal(sampler(LABELS[:2], noise), sampler(LABELS[:2], MoreDraws(noise)))


@pytest.mark.parametrize("name", ["mar", "disa", "gtr"])
def test_too_few_draws_are_refused(name: str) -> None:
    sampler = make_sampler(MODEL, name, **GUIDANCE, **short_settings(name))
    with pytest.raises(ValueError, match=r"noise\.draw"):
        sampler(LABELS, ImageNoise(MODEL, 0, range(3), sampler.num_draws - 2))


# As published


def plan_of(name: str, **settings) -> Plan:
    with torch.device("meta"):
        model = create_model("mar_base")
    return find_method(name).replaced(**settings).plan(model, cfg=3.25)


def lengths(plan: Plan) -> list[int]:
    """The denoising steps of the last chain of each step, which takes all tokens but the detailed ones."""
    return [len(step.chains[-1][0].steps) for step in plan]


def test_disa_takes_the_denoising_steps_of_its_paper() -> None:
    plan = plan_of("disa")
    asked = [METHODS["disa"].num_sampling_steps.at(step, 64, 0) for step in range(64)]
    assert (asked[0], asked[-1], sum(asked)) == (50, 5, 1733)
    assert sum(steps * step.num_tokens for steps, step in zip(asked, plan)) == 5372
    taken = lengths(plan)  # without the duplicates at timestep 950
    assert (taken[0], taken[-1], sum(taken)) == (48, 5, 1681)
    assert sum(steps * step.num_tokens for steps, step in zip(taken, plan)) == 5246
    assert all((head.timesteps[0], head.timesteps[-1]) == (950, 0) for head in plan.heads)
    assert plan.heads[-1].timesteps == (950, 749, 500, 250, 0)
    assert plan_of("mar", num_sampling_steps=5).heads[0].timesteps == (999, 749, 500, 250, 0)


def test_gtr_takes_the_steps_of_its_paper() -> None:
    plan = plan_of("gtr")
    stages, counts = plan.schedule.stages, [step.num_tokens for step in plan]
    assert [stages.count(stage) for stage in range(3)] == [64, 64, 128] and len(plan) == 32
    assert [sum(counts[:24]), sum(counts[24:30]), sum(counts[30:])] == [64, 64, 128]
    assert [set(counts[:24]), set(counts[24:30]), set(counts[30:])] == [{2, 3}, {10, 11}, {64}]
    assert [stages[position] for position in (0, 1, 2, 3, 16, 17, 18, 34)] == [0, 2, 1, 2, 2, 1, 2, 0]
    asked = [METHODS["gtr"].num_sampling_steps.at(step, 32, 30) for step in range(32)]
    assert (asked[0], asked[29:], asked == sorted(asked, reverse=True)) == (50, [20, 20, 20], True)
    detailed = [[(len(head.steps), count) for head, count in step.chains] for step in plan if len(step.chains) > 1]
    assert detailed == [[(48, 6), (20, 58)]] * 2 and len(plan.steps[-2].chains) == 2


def test_a_stage_begins_with_a_refresh_step() -> None:
    refreshes = [step.index for step in plan_of("lazymar+gtr") if step.refresh]
    assert refreshes == [0, 1, 2, 3, 8, 13, 18, 24, 28, 30]  # the paper's start step 5 and interval 9, of 64 steps


def test_the_heads_refresh_interval_shortens_with_annealed_chains() -> None:
    for head in plan_of("lazymar+disa").heads:
        length = len(head.steps)
        full = [index for index in range(length) if head.steps[length - 1 - index] is DenoisingStep.FULL]
        assert full == sorted({*range(0, length, math.ceil(0.07 * length)), length - 1})
    assert {head.steps.count(DenoisingStep.FULL) for head in plan_of("lazymar").heads} == {16}


def test_recap_alternates_in_the_second_half() -> None:
    plan = plan_of("recap")
    assert [step.index for step in plan if not step.refresh] == list(range(33, 64, 2))
    for step, length in zip(plan, lengths(plan)):
        group = 320 if step.refresh else step.stop - step.previous
        assert (step.num_kept, step.num_branches, length) == (group, 2, 100 if step.refresh else 40)
    assert [step.index for step in plan_of("recap+gtr") if not step.refresh] == [17, 19, 21, 23, 25, 27, 29, 31]


@pytest.mark.parametrize("num_iter", [36, 48, 63, 128])  # of the paper, but for the odd one
def test_recap_alternates_in_the_second_half_of_any_number_of_steps(num_iter: int) -> None:
    lazy = [step.index for step in plan_of("recap", num_iter=num_iter) if not step.refresh]
    assert lazy == list(range(math.ceil(num_iter / 2) + 1, num_iter, 2))


@pytest.mark.parametrize("fields", [{"refresh_interval": 1}, {"start_step": 64}, {"start_step": 1000}], ids=str)
def test_policies_without_lazy_steps_have_none_before_a_stage(fields: dict) -> None:
    assert all(step.refresh for step in plan_of("lazymar+gtr", cache=CachePolicy(**fields)))
    assert all(step.refresh for step in plan_of("gtr"))


def test_detailed_tokens_take_no_fewer_steps_than_the_others() -> None:
    plan = plan_of("gtr", num_sampling_steps=100)
    assert {len(head.steps) for head in plan.heads} == {100}
    assert [count for _, count in plan.steps[-1].chains] == [6, 58]


def test_late_guidance_leaves_out_the_first_steps() -> None:
    plan = plan_of("lateguidance")
    scales = [step.cfg for step in plan_of("mar")]
    assert 8 < sum(scale < 1.1 for scale in scales) < 16
    for step, scale in zip(plan, scales):
        expected = (1, 1, 1.0) if scale < 1.1 else (2, 2, scale)
        assert (step.num_branches, step.chains[0][0].num_branches, step.cfg) == expected


@pytest.mark.parametrize("fields", [{}, {"condition_cache": False}, {"token_cache": False}], ids=str)
def test_unguided_steps_compute_the_unconditional_branch_only_for_later_ones(fields: dict) -> None:
    plan = plan_of("lateguidance", cache=CachePolicy(start_step=2, **fields))
    guided = [step.cfg > 1 for step in plan]
    starts = [step.index for step in plan if step.refresh] + [len(plan)]
    for step in plan:
        until = next(start for start in starts if start > step.index)
        wanted = any(guided[step.index : until])
        if not step.refresh and plan.lazy_branches == 1:
            wanted = False
        assert step.num_branches == 1 + wanted


def test_a_printed_plan_shows_every_step() -> None:
    lines = str(plan_of("fast")).splitlines()
    assert len(lines) == 21 and lines[0].split()[:3] == ["step", "kind", "known"]
    assert lines[-1].split()[:6] == ["19", "lazy", "192", "64", "3.24", "1"] and lines[-1].endswith("20 for 58 tokens")


# Names


@pytest.mark.parametrize("name", [*METHODS, "lazymar+disa", "lazymar+gtr", "gtr+recap", "disa+recap+lateguidance"])
def test_methods_are_found_by_their_names(name: str) -> None:
    method = find_method(name)
    assert method == find_method("+".join(reversed(name.split("+")))) == find_method(f" {name.upper()} ")
    declared = [METHODS[part].changes for part in name.split("+")]
    assert method.changes == {setting: value for changes in declared for setting, value in changes.items()}


BAD_NAMES = [
    ("", "method '' is unknown"),
    ("lazy", "method 'lazy' is unknown"),
    ("lazymar+", "method '' is unknown"),
    ("mar+disa", "leave it out"),
    ("disa+mar", "leave it out"),
    ("disa+disa", "has disa twice"),
    ("disa+gtr", "num_sampling_steps"),
    ("lazymar+recap", "both set cache"),
    ("fast+gtr", "num_stages"),
]


@pytest.mark.parametrize(("name", "said"), BAD_NAMES, ids=str)
def test_names_that_make_no_sense_are_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        find_method(name)
    assert str(refused.value).startswith("method ")


# Settings

BAD_SETTINGS = [
    ("num_sampling_steps", lambda: AnnealedSteps(5, 50)),
    ("num_sampling_steps", lambda: AnnealedSteps(50, 1)),
    ("num_sampling_steps", lambda: AnnealedSteps(1001, 5)),
    ("num_sampling_steps", lambda: AnnealedSteps(50, 5, "quadratic")),
    ("num_sampling_steps", lambda: Method(num_sampling_steps=1)),
    ("num_sampling_steps", lambda: Method(num_sampling_steps=1001)),
    ("num_sampling_steps", lambda: Method(num_sampling_steps=AnnealedSteps(50, 20, "generation"))),
    ("num_sampling_steps", lambda: DetailedTokens(0.1, 1)),
    ("num_sampling_steps", lambda: DetailedTokens(0.1, 1001)),
    ("detailed_tokens", lambda: DetailedTokens(0.0)),
    ("detailed_tokens", lambda: DetailedTokens(1.0)),
    ("detailed_tokens", lambda: DetailedTokens(-0.1)),
    ("detailed_tokens", lambda: DetailedTokens(math.nan)),
    ("detailed_tokens", lambda: Method(detailed_tokens=DetailedTokens())),
    ("unguided_below", lambda: Method(unguided_below=0.99)),
    ("unguided_below", lambda: Method(unguided_below=math.nan)),
    ("num_stages", lambda: Method(num_stages=0, num_iter=(1,)).schedule(256, cfg=3)),
    ("num_stages", lambda: Method(num_stages=-1, num_iter=(1,)).schedule(256, cfg=3)),
    ("num_stages", lambda: Method(num_stages=6, num_iter=(1,) * 6).schedule(256, cfg=3)),
    ("num_stages", lambda: Method(num_stages=3, num_iter=(1, 1, 1)).schedule(36, cfg=3)),
    ("num_stages", lambda: Method(num_stages=2, num_iter=(1, 1)).schedule(250, cfg=3)),
    ("num_iter", lambda: Method(num_stages=3).schedule(256, cfg=3)),
    ("num_iter", lambda: Method(num_stages=3, num_iter=(24, 8)).schedule(256, cfg=3)),
    ("num_iter", lambda: Method(num_stages=3, num_iter=(24, 6, 2, 1)).schedule(256, cfg=3)),
    ("num_iter", lambda: Method(num_stages=3, num_iter=(65, 6, 2)).schedule(256, cfg=3)),
    ("num_iter", lambda: Method(num_stages=3, num_iter=(24, 0, 2)).schedule(256, cfg=3)),
    ("num_iter", lambda: Method(num_iter=(24, 6)).schedule(256, cfg=3)),
    ("num_iter", lambda: Method(num_iter=257).schedule(256, cfg=3)),
    ("method", lambda: make_sampler(MODEL, "unheard-of")),
    ("num_stages", lambda: make_sampler(random_model(img_size=24), "gtr")),
]


@pytest.mark.parametrize(("setting", "make"), BAD_SETTINGS)
def test_settings_out_of_range_are_named(setting: str, make) -> None:
    with pytest.raises(ValueError, match=rf"\b{setting}\b"):
        make()


def test_settings_that_methods_do_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="num_steps"):
        make_sampler(MODEL, num_steps=3)


def test_settings_replace_those_of_a_method() -> None:
    plan = make_sampler(MODEL, "lazymar+disa", **{"num_iter": 8, "cache": None}).plan
    assert len(plan) == 8 and not plan.policy.token_cache and plan.heads[0].timesteps[0] == 950
