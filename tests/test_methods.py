"""Methods and their compositions are declared as they were published. `test_sampling.py` tests what they compute."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tools import MODEL, make_sampler

from models import METHODS, AnnealedSteps, CachePolicy, DetailedTokens, Method, create_model, find_method
from models.lazymar.plan import DenoisingKind, Plan


def plan_of(name: str, **settings) -> Plan:
    with torch.device("meta"):
        model = create_model("mar_base")
    return replace(find_method(name), **settings).plan(model, cfg=3.25)


def lengths(plan: Plan) -> list[int]:
    """The denoising steps of the last chain of each step, which takes all tokens but the detailed ones."""
    return [len(step.head_plans[-1][0].kinds) for step in plan]


def lazy_steps(name: str, **settings) -> list[int]:
    return [step.index for step in plan_of(name, **settings) if not step.refresh]


def test_disa_takes_the_denoising_steps_of_its_paper() -> None:
    plan = plan_of("disa")
    asked = [METHODS["disa"].num_sampling_steps.at(step, 64, 0) for step in range(64)]
    assert (asked[0], asked[-1], sum(asked)) == (50, 5, 1733)
    assert sum(steps * step.num_tokens for steps, step in zip(asked, plan)) == 5372
    taken = lengths(plan)  # without the duplicates at timestep 950
    assert (taken[0], taken[-1], sum(taken)) == (48, 5, 1681)
    assert sum(steps * step.num_tokens for steps, step in zip(taken, plan)) == 5246
    assert all((head.timesteps[0], head.timesteps[-1]) == (950, 0) for head in plan.distinct_head_plans)
    assert plan.distinct_head_plans[-1].timesteps == (950, 749, 500, 250, 0)
    assert plan_of("mar", num_sampling_steps=5).distinct_head_plans[0].timesteps == (999, 749, 500, 250, 0)


def test_gtr_takes_the_steps_of_its_paper() -> None:
    plan = plan_of("gtr")
    stages, counts = plan.schedule.stages, [step.num_tokens for step in plan]
    assert [stages.count(stage) for stage in range(3)] == [64, 64, 128] and len(plan) == 32
    assert [sum(counts[:24]), sum(counts[24:30]), sum(counts[30:])] == [64, 64, 128]
    assert [set(counts[:24]), set(counts[24:30]), set(counts[30:])] == [{2, 3}, {10, 11}, {64}]
    assert [stages[position] for position in (0, 1, 2, 3, 16, 17, 18, 34)] == [0, 2, 1, 2, 2, 1, 2, 0]
    asked = [METHODS["gtr"].num_sampling_steps.at(step, 32, 30) for step in range(32)]
    assert (asked[0], asked[29:], asked == sorted(asked, reverse=True)) == (50, [20, 20, 20], True)
    detailed = [
        [(len(head.kinds), count) for head, count in step.head_plans] for step in plan if len(step.head_plans) > 1
    ]
    assert detailed == [[(48, 6), (20, 58)]] * 2 and len(plan.steps[-2].head_plans) == 2


def test_a_stage_begins_with_a_refresh_step() -> None:
    refreshes = [step.index for step in plan_of("lazymar+gtr") if step.refresh]
    assert refreshes == [0, 1, 2, 3, 8, 13, 18, 24, 28, 30]  # the paper's start step 5 and interval 9, of 64 steps
    for fields in ({"refresh_interval": 1}, {"start_step": 64}, {"start_step": 1000}):
        assert not lazy_steps("lazymar+gtr", cache=CachePolicy(**fields))


def test_the_heads_refresh_interval_shortens_with_annealed_chains() -> None:
    for head in plan_of("lazymar+disa").distinct_head_plans:
        length = len(head.kinds)
        full = [index for index in range(length) if head.kinds[length - 1 - index] is DenoisingKind.FULL]
        assert full == sorted({*range(0, length, math.ceil(0.07 * length)), length - 1})
    assert {head.kinds.count(DenoisingKind.FULL) for head in plan_of("lazymar").distinct_head_plans} == {16}


def test_recap_alternates_in_the_second_half() -> None:
    plan = plan_of("recap")
    for step, length in zip(plan, lengths(plan)):
        group = 320 if step.refresh else step.stop - step.previous_start
        assert (step.num_recomputed, step.transformer_branches, length) == (group, 2, 100 if step.refresh else 40)
    assert lazy_steps("recap+gtr") == [17, 19, 21, 23, 25, 27, 29, 31]
    for num_iter in (36, 48, 63, 64, 128):  # of the paper, but for the odd one
        assert lazy_steps("recap", num_iter=num_iter) == list(range(math.ceil(num_iter / 2) + 1, num_iter, 2))


@pytest.mark.parametrize("fields", [None, {}, {"condition_cache": False}, {"token_cache": False}], ids=str)
def test_unguided_steps_compute_the_unconditional_branch_only_for_later_ones(fields: dict | None) -> None:
    plan = plan_of("lateguidance", cache=None if fields is None else CachePolicy(start_step=2, **fields))
    assert 8 < sum(step.cfg == 1 for step in plan) < 16
    starts = [step.index for step in plan if step.refresh] + [len(plan)]
    for step in plan:
        until = next(start for start in starts if start > step.index)
        wanted = any(later.cfg > 1 for later in plan.steps[step.index : until])
        assert step.transformer_branches == 1 + (wanted and (step.refresh or plan.lazy_branches == 2))
        assert step.head_plans[0][0].num_branches == 1 + (step.cfg > 1)


def test_a_printed_plan_shows_every_step() -> None:
    lines = str(plan_of("lazymar+gtr", num_iter=(15, 3, 2))).splitlines()
    assert len(lines) == 21 and lines[0].split()[:3] == ["step", "kind", "known"]
    assert lines[-1].split()[:6] == ["19", "lazy", "192", "64", "3.24", "1"] and lines[-1].endswith("20 for 58 tokens")


# Names and settings


@pytest.mark.parametrize("name", [*METHODS, "lazymar+disa", "lazymar+gtr", "gtr+recap", "disa+recap+lateguidance"])
def test_methods_are_found_by_their_names(name: str) -> None:
    method = find_method(name)
    assert method == find_method("+".join(reversed(name.split("+")))) == find_method(f" {name.upper()} ")
    declared = [METHODS[part].changes for part in name.split("+")]
    assert method.changes == {setting: value for changes in declared for setting, value in changes.items()}


BAD_NAMES = {
    "": "'' is unknown",
    "lazy": "'lazy' is unknown",
    "lazymar+": "'' is unknown",
    "disa+disa": "disa and disa both set",
    "disa+gtr": "num_sampling_steps",
    "lazymar+recap": "both set cache",
    "fast+gtr": "num_stages",
}


@pytest.mark.parametrize(("name", "said"), BAD_NAMES.items())
def test_names_that_make_no_sense_are_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^method .*{said}"):
        find_method(name)


def steps_by_stages(num_stages: int, num_iter: int | tuple[int, ...], seq_len: int = 256) -> None:
    grid = SimpleNamespace(seq_len=seq_len, buffer_size=8)
    Method(num_stages=num_stages, num_iter=num_iter).plan(grid, cfg=3)  # type: ignore[arg-type]


BAD_SETTINGS = [
    ("num_sampling_steps", AnnealedSteps, [(5, 50), (50, 1), (1001, 5), (50, 5, "quadratic")]),
    ("num_sampling_steps", DetailedTokens, [(0.1, 1), (0.1, 1001)]),
    ("num_sampling_steps", None, [(1,), (1001,), (AnnealedSteps(9, 5, "generation"),)]),
    ("detailed_tokens", DetailedTokens, [(0.0,), (1.0,), (-0.1,), (math.nan,)]),
    ("detailed_tokens", None, [(DetailedTokens(),)]),
    ("unguided_below", None, [(0.99,), (math.nan,)]),
    ("lazy_sampling_steps", None, [(1,)]),
    ("num_stages", steps_by_stages, [(0, 64), (-1, 64), (6, (1,) * 6), (3, (1, 1, 1), 36), (2, (1, 1), 250)]),
    ("num_iter", steps_by_stages, [(3, 64), (3, (24, 8)), (3, (24, 6, 2, 1)), (3, (65, 6, 2)), (3, (24, 0, 2))]),
    ("num_iter", steps_by_stages, [(1, (24, 6)), (1, 257)]),
]


@pytest.mark.parametrize(("setting", "make", "given"), BAD_SETTINGS)
def test_settings_out_of_range_are_named(setting: str, make: Callable | None, given: list[tuple]) -> None:
    for arguments in given:
        with pytest.raises(ValueError, match=rf"\b{setting}\b"):
            make(*arguments) if make else Method(**{setting: arguments[0]})


def test_settings_replace_those_of_a_method() -> None:
    plan = make_sampler(MODEL, "lazymar+disa", num_iter=8, cache=None).plan
    assert len(plan) == 8 and not plan.policy.token_cache and plan.distinct_head_plans[0].timesteps[0] == 950
    with pytest.raises(TypeError, match="num_steps"):
        make_sampler(MODEL, num_steps=3)
