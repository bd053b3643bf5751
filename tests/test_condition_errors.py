"""The errors of conditions that the ablations are judged by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tools import LABELS, random_model

from models import CachePolicy, make_plan, mar_schedule
from util.condition_errors import condition_errors, make_teacher, measure_policies

SCHEDULE = mar_schedule(64, num_iter=12, cfg=2.5, num_sampling_steps=4)
POLICY = CachePolicy(start_step=2, refresh_interval=4, min_margin=2)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def teacher(model):
    return make_teacher(model, SCHEDULE, LABELS)


def errors_of(model, teacher, **settings):
    policy = CachePolicy(**{**vars(POLICY), **settings})
    return condition_errors(model, make_plan(teacher.schedule, policy, buffer_size=model.buffer_size), teacher)


def test_the_teacher_holds_the_conditions_of_the_whole_network(model, teacher):
    classes = torch.cat([model.class_emb(LABELS), model.fake_latent.expand(3, -1)])
    for step, expected in zip(make_plan(SCHEDULE, buffer_size=8), teacher.conditions):
        tokens = teacher.tokens[:, : step.start].repeat(2, 1, 1)
        with torch.inference_mode():
            found = model(classes, tokens, teacher.positions.repeat(2, 1))[:, : step.num_tokens]
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-10, atol=1e-10)


def test_errors_are_those_of_the_definition(model, teacher):
    errors = errors_of(model, teacher, token_cache=False)
    lazy = [step.index for step in make_plan(SCHEDULE, POLICY, buffer_size=8) if not step.refresh]
    assert np.abs(errors.conditional).max() < 1e-12  # the condition cache leaves the conditional branch alone
    refreshed = np.delete(errors.guidance, lazy, axis=0)
    assert np.nanmax(np.abs(refreshed)) < 1e-12 < errors.guidance[lazy].min()
    # Step 3 is lazy and reuses, for the tokens that it predicts, the difference of the refresh step before, 2.
    step = make_plan(SCHEDULE, POLICY, buffer_size=8).steps[3]
    classes = torch.cat([model.class_emb(LABELS), model.fake_latent.expand(3, -1)])
    raw = {}
    hook = model.decoder_blocks[-1].register_forward_hook(lambda _, __, output: raw.update(decoded=output))
    before = make_plan(SCHEDULE, POLICY, buffer_size=8).steps[2]
    with torch.inference_mode():
        model(classes, teacher.tokens[:, : before.start].repeat(2, 1, 1), teacher.positions.repeat(2, 1))
        stored = raw["decoded"][3:] - raw["decoded"][:3]
        model(classes, teacher.tokens[:, : step.start].repeat(2, 1, 1), teacher.positions.repeat(2, 1))
        rows = slice(8 + step.start, 8 + step.stop)
        ours = model.decoder_norm(raw["decoded"][:3, rows] + stored[:, rows])
        conditional, theirs = model.decoder_norm(raw["decoded"][:, rows]).chunk(2)
    hook.remove()
    expected = (ours - theirs).norm(dim=-1) / (conditional - theirs).norm(dim=-1)
    np.testing.assert_allclose(errors.guidance[3], expected.mean(dim=1), rtol=1e-9)


def test_both_branches_at_every_step_are_the_token_cache_alone(model, teacher):
    always, alone = errors_of(model, teacher, condition_interval=1), errors_of(model, teacher, condition_cache=False)
    np.testing.assert_allclose(always.guidance, alone.guidance, rtol=1e-9, atol=1e-12)
    seldom, never = errors_of(model, teacher, condition_interval=2), errors_of(model, teacher)
    means = [errors.means()[1].value for errors in (always, seldom, never)]
    assert means[0] < means[1] < means[2]


def test_a_table_holds_means_with_errors_and_costs(model, teacher):
    found = measure_policies(model, teacher, {"caches": {"both": POLICY}})["caches"]["both"]
    conditional, guidance = found["means"]
    assert 0 < conditional.error < conditional.value < guidance.value and found["flops"] > 0
    assert found["refresh_steps"] == [0, 1, 2, 6, 10] and len(found["by_step"][0]) == 12
    assert [error > 1e-12 for error in found["by_step"][0]] == [
        step not in found["refresh_steps"] for step in range(12)
    ]


def test_what_cannot_be_compared_is_refused(model, teacher):
    other = make_plan(mar_schedule(64, num_iter=8, num_sampling_steps=4), POLICY, buffer_size=8)
    with pytest.raises(ValueError, match="another schedule"):
        condition_errors(model, other, teacher)
    with pytest.raises(ValueError, match="no lazy step"):
        errors_of(model, teacher, refresh_interval=1)
