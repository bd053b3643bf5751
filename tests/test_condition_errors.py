"""The errors of conditions that the ablations are judged by."""

import numpy as np
import pytest
import torch
from tools import LABELS, random_model

from models import CachePolicy, make_plan, mar_schedule
from util.condition_errors import condition_errors, make_teacher, mean_errors, measure_policies, measure_redundancy

SCHEDULE = mar_schedule(64, num_iter=12, cfg=2.5, num_sampling_steps=4)
POLICY = CachePolicy(start_step=2, refresh_interval=4, min_margin=2)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def teacher(model):
    return make_teacher(model, SCHEDULE, LABELS)


def errors_of(model, teacher, **settings):
    return condition_errors(model, teacher, CachePolicy(**{**vars(POLICY), **settings}))


def test_the_teacher_holds_the_conditions_of_the_whole_network(model, teacher):
    classes = torch.cat([model.class_emb(LABELS), model.fake_latent.expand(3, -1)])
    for step, expected in zip(make_plan(SCHEDULE, buffer_size=8), teacher.conditions):
        tokens = teacher.tokens[:, : step.start].repeat(2, 1, 1)
        with torch.inference_mode():
            found = model(classes, tokens, teacher.positions.repeat(2, 1))[:, : step.num_tokens]
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-10, atol=1e-10)


def test_errors_are_those_of_the_definition(model, teacher):
    conditional_errors, errors = errors_of(model, teacher, token_cache=False)
    lazy = [step.index for step in make_plan(SCHEDULE, POLICY, buffer_size=8) if not step.refresh]
    assert np.abs(conditional_errors).max() < 1e-12  # the condition cache leaves the conditional branch alone
    refreshed = np.delete(errors, lazy, axis=0)
    assert np.nanmax(np.abs(refreshed)) < 1e-12 < errors[lazy].min()
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
    np.testing.assert_allclose(errors[3], expected.mean(dim=1), rtol=1e-9)


def test_both_branches_at_every_step_are_the_token_cache_alone(model, teacher):
    always, alone = errors_of(model, teacher, condition_interval=1), errors_of(model, teacher, condition_cache=False)
    np.testing.assert_allclose(always[1], alone[1], rtol=1e-9, atol=1e-12)
    seldom, never = errors_of(model, teacher, condition_interval=2), errors_of(model, teacher)
    means = [mean_errors(errors)[1].value for errors in (always, seldom, never)]
    assert means[0] < means[1] < means[2]


def test_a_table_holds_means_with_errors_and_costs(model, teacher):
    found = measure_policies(model, teacher, {"caches": {"both": POLICY}})["caches"]["both"]
    conditional, guidance = found["means"]
    assert 0 < conditional.error < conditional.value < guidance.value and found["flops"] > 0
    lazy = [error > 1e-12 for error in found["by_step"][0]]
    assert [step for step in range(12) if not lazy[step]] == [0, 1, 2, 6, 10], "refresh steps have no error"


def test_redundancy_is_measured_by_rows_and_by_distance(model, teacher):
    found = measure_redundancy(model, teacher)
    change, errors = np.array(found["change"]), np.array(found["errors"])
    assert change.shape == (11, 3) and errors.shape == (9, 2)
    assert (change[:, 0] > change[:, 2]).all() and (change > 0).all(), "tokens that have become known change most"
    assert (errors[1:] > errors[0]).all(), "errors grow with the distance"
    without_difference = random_model()
    without_difference.class_emb.weight.data[:] = without_difference.fake_latent.data
    errors = np.array(measure_redundancy(without_difference, teacher)["errors"])
    assert errors[:, 0].max() < 1e-12 < 1e-3 < errors[:, 1].min()
