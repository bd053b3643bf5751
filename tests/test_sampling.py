"""The sampler computes what `naive.py` defines, which shares nothing with it but the weights."""

import copy
import functools
import math
from dataclasses import replace
from itertools import product

import naive
import numpy as np
import pytest
import torch
from tools import (
    FIELDS,
    GUIDANCE,
    LABELS,
    MODEL,
    SETTINGS,
    SMALL,
    batch_of,
    make_sampler,
    perturb,
    random_model,
    relative_error,
    short_settings,
)
from torch import Tensor

import models.lazymar.head
from models import (
    MAR,
    AnnealedSteps,
    CachePolicy,
    DetailedTokens,
    ImageNoise,
    Method,
    Sampler,
    cast_model,
    create_model,
    find_method,
    make_plan,
    mar_schedule,
    pack_linear_layers,
    sample_tokens,
)
from models.linear import PackedLinear


def assert_equal_to_naive(name: str, size: int = 1, model: MAR = SMALL, **changes) -> None:
    settings = short_settings(name, **changes)
    run = {setting: settings.pop(setting) for setting in GUIDANCE}
    method = replace(find_method(name), **settings)
    sampler = make_sampler(model, method, **run)
    noise = sampler.noise(5, range(size))
    result = sampler(LABELS[:size], noise)
    expected = naive.sample_tokens(model, LABELS[:size], method, **run, noise=noise)
    assert result.shape == expected.shape and result.isfinite().all()
    assert relative_error(result, expected) < 1e-9


# Against the definition

COMPOSITIONS = ["disa", "recap", "lateguidance", "fast", "lazymar+disa", "lazymar+gtr", "lazymar+lateguidance"]
COMPOSITIONS += ["recap+gtr", "disa+recap+lateguidance"]
CACHES = ("token_cache", "condition_cache", "head_cache")
SWITCHES = [dict(zip(CACHES, on)) for on in product([True, False], repeat=3)]
PREDICTED_ALONE = {"min_margin": 0, "recomputed_fractions": ((0, 0.0),)}
OTHER_RULES = [{"selection": rule} for rule in ("keys", "outputs")]
BOTH_BRANCHES = [{"condition_interval": interval, "num_iter": 12} for interval in (1, 2, 3)]
OTHER_GUIDANCE = [{"cfg": 1.0}, {"cfg_schedule": "constant"}]
OTHER_LENGTHS = [{"num_iter": 1}, {"num_iter": 16}]  # as many as tokens
OTHER_CHAINS = [{"num_sampling_steps": 2, "temperature": 0.0}, {"num_sampling_steps": 30}]
OTHER_HEADS = [
    *({"head_refresh_interval": interval} for interval in (1, 1000, 0.2)),
    *({"head_skipped_blocks": blocks} for blocks in ((), (1, 3), (0, 1, 2, 3, 4, 5))),
    {"head_warmup": 0.0},
    {"head_warmup": 0.5, "head_skipped_blocks": (0, 3, 4), "head_refresh_interval": 4},
]
UNGUIDED_CACHES = [
    # Both branches of the token cache have to be there at the first guided step, which may be a lazy one.
    {"condition_cache": False, "selection": "random"},
    {"condition_cache": False, "prune_layer": 1, **PREDICTED_ALONE},
    {"token_cache": False},
    {"token_cache": False, "condition_cache": False},
    {"selection": "random"},
]
Runs = dict[str, list[dict]]  # by method: changes to its short settings, or to its cache policy
SHORT_RUNS: Runs = {
    "mar": OTHER_GUIDANCE + OTHER_LENGTHS + OTHER_CHAINS,
    "lazymar": [
        *OTHER_LENGTHS,
        *OTHER_CHAINS,
        *BOTH_BRANCHES,
        *OTHER_RULES,
        *({"num_sampling_steps": steps} for steps in (3, 5, 7, 8, 15, AnnealedSteps(24, 20))),
        *({"num_sampling_steps": 21, "cfg": cfg, **switches} for switches in SWITCHES for cfg in (1.0, 2.5)),
        *({"num_sampling_steps": 21, **fields} for fields in OTHER_HEADS),
        *({"num_sampling_steps": AnnealedSteps(9, 3), "lazy_sampling_steps": most} for most in (2, 5, 100)),
    ],
    "disa": [
        {"num_iter": num_iter, "num_sampling_steps": AnnealedSteps(11, 2, schedule)}
        for num_iter in (1, 8)
        for schedule in ("linear", "cosine")
    ],
    "gtr": [
        *({"num_stages": 2, "num_iter": num_iter} for num_iter in ((4, 3), (1, 1))),
        {"num_iter": (4, 1, 3)},
        # None are detailed; or they take as many denoising steps as all others; or they are too few for one token.
        *({"detailed_tokens": chosen} for chosen in (None, DetailedTokens(0.9, 2), DetailedTokens(0.01, 9))),
        {"num_sampling_steps": 12},
        {"num_sampling_steps": AnnealedSteps(10, 4, "cosine")},
    ],
    "lazymar+lateguidance": [
        *({"unguided_below": 1.15, **fields} for fields in UNGUIDED_CACHES),  # steps 0 and 1, before the start step
        *({"unguided_below": 1.6, "refresh_interval": 5, **fields} for fields in UNGUIDED_CACHES),  # steps 0 to 5
        *({"unguided_below": below} for below in (2.4, math.inf)),  # all but the last; all
        *({"unguided_below": below, "cfg_schedule": "constant"} for below in (2.5, 2.6)),  # none; all
    ],
}
RUNS_WITH_64_TOKENS: Runs = {name: [{}] for name in COMPOSITIONS} | {
    "disa+recap": OTHER_GUIDANCE,
    "lazymar+gtr+lateguidance": [{}, *OTHER_GUIDANCE],
    "gtr": [{}, *OTHER_GUIDANCE, {"num_stages": 4, "num_iter": (2, 1, 3, 2)}],
    "lazymar": [
        {"cfg_schedule": "constant"},
        {"num_iter": 64, "num_sampling_steps": 2},
        # In block 0 only the 8 buffer rows differ from the previous step's, besides those that are kept anyway.
        {"prune_layer": 0, **PREDICTED_ALONE, "start_step": 1},
        {"prune_layer": 0, **PREDICTED_ALONE, "min_margin": 5, "start_step": 0, "refresh_interval": 100},
        {"prune_layer": 0, **PREDICTED_ALONE, "min_margin": 8, "condition_cache": False},
        {"prune_layer": 1, **PREDICTED_ALONE, "start_step": 1, "refresh_interval": 9},
        {"prune_layer": 4, "condition_cache": False},
        {"refresh_steps": (3, 4, 8)},
        {"refresh_steps": (), "condition_cache": False},
        {"start_step": 0.3},
        {"start_step": 0, "refresh_interval": 3},
        {"refresh_interval": 1},
        {"selection": "random"},
        {"selection": "random", "prune_layer": 0, "condition_cache": False, "min_margin": 0},
        {"min_margin": 1000},
        {"recomputed_fractions": ((0, 1.0), (10, 0.7), (32, 0.35)), "min_margin": 0, "start_step": 0},
    ],
}


def every_one_of(runs: Runs) -> pytest.MarkDecorator:
    cases = [(name, changes) for name, of_method in runs.items() for changes in of_method]
    return pytest.mark.parametrize(("name", "changes"), cases, ids=str)


@every_one_of(SHORT_RUNS)
def test_the_sampler_computes_the_definition(name: str, changes: dict) -> None:
    assert_equal_to_naive(name, **changes)


@every_one_of(RUNS_WITH_64_TOKENS)
def test_the_sampler_computes_the_definition_for_several_images(name: str, changes: dict) -> None:
    assert_equal_to_naive(name, size=2, model=MODEL, **changes)


@pytest.mark.parametrize("rows", [1, 40])  # they split groups of equal denoising steps
def test_modulations_may_be_split_into_matmuls_of_any_size(rows: int, monkeypatch) -> None:
    monkeypatch.setattr(models.lazymar.head, "ROWS_PER_MATMUL", rows)
    assert_equal_to_naive("lazymar", size=2, num_sampling_steps=21)


def test_encoder_and_decoder_may_differ_in_size() -> None:
    model = random_model(encoder_embed_dim=24, encoder_num_heads=2, encoder_depth=1, decoder_num_heads=8, mlp_ratio=2)
    assert_equal_to_naive("lazymar", model=model)


EXPLICIT = [
    {"tokens_per_step": [1, 5, 2, 40, 16], "cfg": 2.5},
    {"tokens_per_step": [30, 34], "cfg": [1.0, 3.0]},
    {"cfg": [1.0, 1.5, 1.0, 4.0, 2.0, 1.0]},
]


@pytest.mark.parametrize("changes", EXPLICIT, ids=str)
@pytest.mark.parametrize("policy", [None, CachePolicy(start_step=1, refresh_interval=3)], ids=["baseline", "lazy"])
def test_tokens_and_cfg_scales_may_be_listed(changes: dict, policy: CachePolicy | None) -> None:
    method, labels = Method(num_iter=6, num_sampling_steps=10, cache=policy), LABELS[:1]
    schedule = mar_schedule(64, num_iter=6, num_sampling_steps=10, temperature=0.9, **changes)
    sampler = Sampler(MODEL, make_plan(schedule, policy, buffer_size=8))
    noise = sampler.noise(5, [0])
    expected = naive.sample_tokens(
        MODEL, labels, method, cfg_schedule="linear", temperature=0.9, noise=noise, **changes
    )
    assert relative_error(sampler(labels, noise), expected) < 1e-9


# Comparisons that mistakes do not survive; test_reference.py has those in LazyMAR's policy and in DiSA

MISTAKES: Runs = {
    "lazymar": [{"cfg": 2.501}, {"temperature": 0.901}, {"cfg_schedule": "constant"}],
    "gtr": [
        {"num_stages": 1, "num_iter": 7, "num_sampling_steps": AnnealedSteps(12, 5), "detailed_tokens": None},
        {"num_iter": (3, 3, 1)},
        {"num_sampling_steps": AnnealedSteps(12, 5)},
        *({"detailed_tokens": chosen} for chosen in (None, DetailedTokens(0.3, 9), DetailedTokens(0.2, 10))),
    ],
    "recap": [{"lazy_sampling_steps": 7}, {"min_margin": 1}, {"prune_layer": 1}, {"start_step": 6}],
    "lateguidance": [{"unguided_below": 1.2}],
}


@every_one_of(MISTAKES)
def test_mistakes_in_the_settings_are_seen(name: str, changes: dict) -> None:
    labels, noise = batch_of(MODEL, 1)
    mistaken, right = (
        sample_tokens(MODEL, labels, method=name, **settings, noise=noise)
        for settings in (short_settings(name, **changes), short_settings(name))
    )
    assert relative_error(mistaken, right) > 1e-7


# Noise, batches, precision


@pytest.mark.parametrize("name", ["mar", "lazymar", "lazymar+gtr", "disa+recap+lateguidance"])
def test_images_do_not_depend_on_their_batch_or_on_more_draws(name: str) -> None:
    indices = [40, 7, 19]
    sampler = make_sampler(MODEL, name, **short_settings(name))

    def sample(places: list[int], more_draws: int = 0) -> Tensor:
        noise = sampler.noise(3, [indices[place] for place in places])
        draw, more = noise.draw, torch.full((more_draws, 1, 1, 1), math.nan)
        noise.draw = lambda *step: torch.cat([drawn := draw(*step), more.expand(-1, *drawn.shape[1:])])
        return sampler(LABELS[places], noise)

    assert torch.equal(sampler(LABELS[:2]), sampler(LABELS[:2], sampler.noise(0, range(2))))
    together = sample([0, 1, 2])
    for places in ([0], [1], [2], [2, 0]):
        assert relative_error(sample(places), together[places]) < 1e-9
    assert torch.equal(sample([0, 1, 2], more_draws=9), together)


def test_between_steps_gradients_may_be_computed() -> None:
    sampler = make_sampler(SMALL, **short_settings("lazymar"))
    for _ in sampler.steps(LABELS[:1], None, sampler.empty_latents(1)):
        assert not torch.is_inference_mode_enabled()


def test_noise_differs_between_images_seeds_and_steps() -> None:
    noise = ImageNoise(MODEL, 3, [0, 1], 21)
    assert (noise.orders.sort(dim=1).values == torch.arange(64)).all()
    assert not torch.equal(noise.orders[0], noise.orders[1])
    draws = [noise.draw(0, 5)[:, 0], noise.draw(0, 5)[:, 1], noise.draw(1, 5)[:, 0]]
    draws.append(ImageNoise(MODEL, 4, [0], 21).draw(0, 5)[:, 0])
    assert draws[0].shape == (21, 5, 4)
    assert all((draws[0] - other).abs().min() > 0 for other in draws[1:])
    assert torch.equal(noise.draw(0, 5)[:, 0], draws[0])
    values = noise.draw(2, 60)
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


@functools.cache
def sample_in(dtype: torch.dtype, policy: CachePolicy | None, packed: bool = False) -> Tensor:
    torch.manual_seed(0)
    model = cast_model(perturb(create_model("mar_base", **FIELDS), 0.02), dtype)
    labels, noise = batch_of(model, 2)
    packed_model = pack_linear_layers(copy.deepcopy(model))
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())
    return sample_tokens(packed_model if packed else model, labels, **SETTINGS, cache=policy, noise=noise)


@pytest.mark.parametrize("policy", [None, CachePolicy()], ids=["baseline", "lazy"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_low_precision_gives_float32_latents_close_to_float64(dtype: torch.dtype, policy: CachePolicy | None) -> None:
    latents = sample_in(dtype, policy)
    assert latents.dtype == torch.float32 and latents.shape == (2, 4, 8, 8)
    assert relative_error(latents, sample_in(torch.float64, policy)) < TOLERANCE[dtype]
    if dtype != torch.float16:
        packed = sample_in(dtype, policy, packed=True)
        assert relative_error(packed, latents) < TOLERANCE[dtype], "packed layers change more than rounding"


def test_patchify_takes_tokens_row_by_row_with_channels_first() -> None:
    latents = torch.arange(2 * 4 * 8 * 8).reshape(2, 4, 8, 8).double()
    tokens = SMALL.patchify(latents)  # 4 x 4 tokens of 4 x 2 x 2 numbers
    assert tokens.shape == (2, 16, 16)
    assert torch.equal(tokens[1, 6], latents[1, :, 2:4, 4:6].flatten())  # second row of tokens, third column
    assert torch.equal(SMALL.unpatchify(tokens), latents)


# The sampler's version


class SameNoiseEverywhere:
    """The orders of `ImageNoise`, and draws by NumPy, whose bits do not depend on the processor."""

    orders = batch_of(MODEL, 2)[1].orders

    def draw(self, step: int, num_tokens: int) -> Tensor:
        shape = SETTINGS["num_sampling_steps"] + 1, 2, num_tokens, MODEL.token_dim
        return torch.from_numpy(np.random.RandomState(step).standard_normal(shape))


FINGERPRINTS = {
    "baseline": [
        [47474.51061662, 276315.5867361, -264633.1283168, 28185.11460844],
        [154925.7122003, -15098.93278632, -23733.29127176, -134182.8111477],
    ],
    "lazy": [
        [76654.28116559, 287930.8542928, -306583.4239424, 40086.42128661],
        [100533.1826482, 25516.36274294, -34358.12363386, -176269.8738519],
    ],
}
IMAGES_CHANGE = (
    "the same settings and seed give other images: if they differ by more than rounding, raise SAMPLER_VERSION in "
    "models/lazymar/sampler.py, so that no run is continued with other images; then put the new numbers here"
)


@pytest.mark.parametrize(("policy", "expected"), [*zip([None, CachePolicy()], FINGERPRINTS.values())], ids=FINGERPRINTS)
def test_images_change_with_the_samplers_version_alone(policy: CachePolicy | None, expected: list) -> None:
    latents = sample_tokens(MODEL, LABELS[:2], **SETTINGS, cache=policy, noise=SameNoiseEverywhere())
    fingerprint = latents.flatten(2) @ torch.arange(64).double().cos()  # [images, channels]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(fingerprint, expected, rtol=1e-9, atol=0, msg=IMAGES_CHANGE)


def test_noise_changes_with_the_samplers_version_alone() -> None:
    noise = ImageNoise(create_model("mar_tiny"), 3, [0, 41], 101)
    assert noise.orders[:, :6].tolist() == [[91, 92, 140, 43, 211, 131], [147, 169, 48, 53, 19, 160]], IMAGES_CHANGE
    values = noise.draw(2, 5).flatten(2)[[0, 7, 100], :, 3].flatten().tolist()
    expected = [-0.208578, 0.235960, 0.770916, 0.354436, -1.382423, -0.825951]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5, msg=IMAGES_CHANGE)  # rounding is the processor's


# Bad arguments

BAD_ARGUMENTS = {
    "num_iter": [0, 65],
    "cfg": [0.5, math.nan, math.inf],
    "cfg_schedule": ["cosine"],
    "num_sampling_steps": [1, 1001],
    "temperature": [-0.1, math.nan],
    "class_labels": [torch.tensor(labels) for labels in ([], [[0]], [0.0, 1.0], [0, 5], [-1, 2])],
    "noise": [ImageNoise(MODEL, 5, range(2), 22), ImageNoise(MODEL, 5, range(3), 21)],
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    for value in BAD_ARGUMENTS[name]:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            sample_tokens(MODEL, **{"class_labels": LABELS, **SETTINGS, name: value})


def test_a_prune_layer_below_the_decoder_is_named() -> None:
    with pytest.raises(ValueError, match="prune_layer"):
        sample_tokens(MODEL, LABELS, **SETTINGS, cache=CachePolicy(prune_layer=5))


BAD_FIELDS = {
    "start_step": [-1, 1.5, math.inf],
    "refresh_interval": [0],
    "refresh_steps": [(3, -1)],
    "prune_layer": [-1],
    "min_margin": [-1],
    "selection": ["likeness"],
    "recomputed_fractions": [
        (),
        ((1, 0.5),),
        ((0, 1.0), (9, 0.5), (9, 0.4)),
        ((0, 1.1),),
        ((0, -0.1),),
        ((0, math.nan),),
    ],
    "head_refresh_interval": [0, 1.5],
    "head_skipped_blocks": [(1, -2)],
    "head_warmup": [-0.1, 1.1, math.nan],
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_policy_fields_out_of_range_are_named(name: str) -> None:
    for value in BAD_FIELDS[name]:
        with pytest.raises(ValueError, match=name):
            CachePolicy(**{name: value})


BAD_SCHEDULES = [{"tokens_per_step": [60, 3]}, {"tokens_per_step": [64, 0]}]
BAD_SCHEDULES += [{"cfg": [1.0, 2.0], "num_iter": 3}, {"cfg": [1.0, 0.5], "num_iter": 2}]


@pytest.mark.parametrize("arguments", BAD_SCHEDULES, ids=str)
def test_schedules_that_do_not_fit_are_named(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        mar_schedule(64, **arguments)
