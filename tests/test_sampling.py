"""The sampler computes what `naive.py` defines, which shares nothing with it but the weights."""

from __future__ import annotations

import copy
import math
from itertools import product

import naive
import numpy as np
import pytest
import torch
from tools import FIELDS, LABELS, MODEL, SETTINGS, make_sampler, perturb, random_model, relative_error
from torch import Tensor

import models.lazymar.head
from models import (
    MAR,
    CachePolicy,
    ImageNoise,
    Sampler,
    cast_model,
    create_model,
    make_plan,
    mar_schedule,
    pack_linear_layers,
    sample_tokens,
)
from models.linear import PackedLinear, can_be_packed


def noise_for(model: MAR, batch: int, num_sampling_steps: int) -> ImageNoise:
    return ImageNoise(model, 5, range(batch), num_sampling_steps)


def assert_equal_to_naive(policy: CachePolicy | None, model: MAR = MODEL, batch: int = 1, **changes) -> None:
    settings = {**SETTINGS, **changes, "cache": policy}
    sampler = make_sampler(model, **settings)
    noise = sampler.noise(5, range(batch))
    result = sampler(LABELS[:batch], noise)
    expected = naive.sample_tokens(model, LABELS[:batch], **settings, noise=noise)
    assert result.shape == expected.shape and result.isfinite().all()
    assert relative_error(result, expected) < 1e-9


# Against the definition

RUNS = [
    {"num_iter": 1},
    {"num_iter": 7, "cfg_schedule": "constant"},
    {"num_iter": 64},
    {"cfg": 1.0, "num_iter": 7, "batch": 3},
    {"num_sampling_steps": 2, "temperature": 0.0},
    {"num_sampling_steps": 30},
]


@pytest.mark.parametrize("policy", [None, CachePolicy()], ids=["baseline", "lazy"])
@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_run_settings(changes: dict, policy: CachePolicy | None) -> None:
    assert_equal_to_naive(policy, **changes)


@pytest.mark.parametrize("rows", [1, 40])  # they split groups of equal denoising steps
def test_modulations_in_matmuls_of_any_size(rows: int, monkeypatch) -> None:
    monkeypatch.setattr(models.lazymar.head, "ROWS_PER_MATMUL", rows)
    assert_equal_to_naive(CachePolicy(), batch=2)


@pytest.mark.parametrize("policy", [None, CachePolicy(start_step=1)], ids=["baseline", "lazy"])
def test_patches_of_two_by_two_latents(policy: CachePolicy | None) -> None:
    assert_equal_to_naive(policy, model=random_model(patch_size=2), num_iter=9, batch=2)


def test_encoder_and_decoder_of_different_size() -> None:
    model = random_model(encoder_embed_dim=24, encoder_num_heads=2, encoder_depth=1, decoder_num_heads=8, mlp_ratio=2)
    assert_equal_to_naive(CachePolicy(start_step=2), model=model)


SWITCHES = [dict(zip(("token_cache", "condition_cache", "head_cache"), on)) for on in product([True, False], repeat=3)]
SWITCH_IDS = ["+".join(name for name, on in switches.items() if on) or "nothing" for switches in SWITCHES]


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("switches", SWITCHES, ids=SWITCH_IDS)
def test_each_cache_can_be_switched_off(switches: dict, cfg: float) -> None:
    assert_equal_to_naive(CachePolicy(start_step=2, **switches), cfg=cfg, num_iter=9)


HALVING = ((0, 1.0), (10, 0.7), (32, 0.35))
POLICIES = [
    # In block 0 only the 8 buffer rows differ from the previous step's, besides those that are kept anyway.
    {"prune_layer": 0, "min_margin": 0, "kept_fractions": ((0, 0.0),), "start_step": 1},
    {"prune_layer": 0, "min_margin": 5, "kept_fractions": ((0, 0.0),), "start_step": 0, "refresh_interval": 100},
    {"prune_layer": 0, "min_margin": 8, "kept_fractions": ((0, 0.0),), "condition_cache": False},
    {"prune_layer": 1},
    {"prune_layer": 4, "condition_cache": False, "refresh_interval": 4},
    {"refresh_steps": (3, 4, 9)},
    {"refresh_steps": (), "condition_cache": False},
    {"start_step": 0.3},
    {"head_warmup": 0.5, "head_skipped_blocks": (0, 3, 4), "head_refresh_interval": 4},
    {"selection": "random"},
    {"selection": "random", "prune_layer": 0, "condition_cache": False, "min_margin": 0},
    {"start_step": 1, "refresh_interval": 100},
    {"refresh_interval": 1},
    {"refresh_interval": 3},
    {"min_margin": 0, "kept_fractions": ((0, 0.0),), "start_step": 1, "prune_layer": 1},
    {"min_margin": 1000},
    {"kept_fractions": HALVING, "min_margin": 0, "start_step": 0},
    {"kept_fractions": ((0, 1.0),), "start_step": 1, "refresh_interval": 5},
    {"head_refresh_interval": 1},
    {"head_refresh_interval": 1000},
    {"head_refresh_interval": 0.2},
    {"head_skipped_blocks": ()},
    {"head_skipped_blocks": (1, 3)},
    {"head_skipped_blocks": (5,)},
    {"head_skipped_blocks": (0, 1, 2, 3, 4, 5)},
    {"head_warmup": 0.0},
    {"head_warmup": 0.5},
    {"head_warmup": 0.5, "head_skipped_blocks": (0, 3, 4), "head_refresh_interval": 4, "token_cache": False},
]


@pytest.mark.parametrize("fields", POLICIES, ids=str)
def test_policy_fields(fields: dict) -> None:
    assert_equal_to_naive(CachePolicy(**fields), batch=2)


@pytest.mark.parametrize("num_iter", [1, 2, 64])
def test_start_in_lazy_mode_at_any_number_of_steps(num_iter: int) -> None:
    assert_equal_to_naive(CachePolicy(start_step=0, refresh_interval=3), num_iter=num_iter, num_sampling_steps=10)


EXPLICIT = [
    {"tokens_per_step": [1, 5, 2, 40, 16]},
    {"tokens_per_step": [30, 34], "cfg": [1.0, 3.0]},
    {"cfg": [1.0, 1.5, 1.0, 4.0, 2.0, 1.0]},
]


@pytest.mark.parametrize("changes", EXPLICIT, ids=str)
@pytest.mark.parametrize("policy", [None, CachePolicy(start_step=1, refresh_interval=3)], ids=["baseline", "lazy"])
def test_explicit_tokens_and_cfg_scales(changes: dict, policy: CachePolicy | None) -> None:
    settings = {"num_iter": 6, "cfg": 2.5, "cfg_schedule": "linear", "num_sampling_steps": 10, **changes}
    plan = make_plan(mar_schedule(64, **settings), policy, buffer_size=8)
    sampler = Sampler(MODEL, plan, temperature=0.9)
    noise = sampler.noise(5, [0])
    expected = naive.sample_tokens(MODEL, LABELS[:1], **settings, temperature=0.9, cache=policy, noise=noise)
    assert relative_error(sampler(LABELS[:1], noise), expected) < 1e-9


# Mistakes in the policy are planted in test_reference.py, those in the run here


@pytest.fixture(scope="module")
def expected_with_default_policy() -> Tensor:
    noise = noise_for(MODEL, 2, SETTINGS["num_sampling_steps"])
    return naive.sample_tokens(MODEL, LABELS[:2], **SETTINGS, cache=CachePolicy(), noise=noise)


@pytest.mark.parametrize("change", [{"cfg": 2.501}, {"temperature": 0.901}, {"cfg_schedule": "constant"}], ids=str)
def test_mistakes_in_the_run_are_seen(change: dict, expected_with_default_policy: Tensor) -> None:
    noise = noise_for(MODEL, 2, SETTINGS["num_sampling_steps"])
    result = sample_tokens(MODEL, LABELS[:2], **{**SETTINGS, **change}, cache=CachePolicy(), noise=noise)
    assert relative_error(result, expected_with_default_policy) > 1e-7


# Noise, batches, precision


@pytest.mark.parametrize("policy", [None, CachePolicy()], ids=["baseline", "lazy"])
def test_images_do_not_depend_on_their_batch(policy: CachePolicy | None) -> None:
    indices = [40, 7, 19]
    settings = {**SETTINGS, "cache": policy}

    def sample(places: list[int]) -> Tensor:
        noise = ImageNoise(MODEL, 3, [indices[place] for place in places], SETTINGS["num_sampling_steps"])
        return sample_tokens(MODEL, LABELS[places], **settings, noise=noise)

    together = sample([0, 1, 2])
    for place in range(3):
        assert relative_error(sample([place]), together[place : place + 1]) < 1e-9
    assert relative_error(sample([2, 0]), together[[2, 0]]) < 1e-9


def test_noise_differs_between_images_seeds_and_steps() -> None:
    noise = ImageNoise(MODEL, 3, [0, 1], 20)
    assert (noise.orders.sort(dim=1).values == torch.arange(64)).all()
    assert not torch.equal(noise.orders[0], noise.orders[1])
    draws = [noise.draw(0, 5)[:, 0], noise.draw(0, 5)[:, 1], noise.draw(1, 5)[:, 0]]
    draws.append(ImageNoise(MODEL, 4, [0], 20).draw(0, 5)[:, 0])
    assert draws[0].shape == (21, 5, 4)
    for i, j in ((0, 1), (0, 2), (0, 3)):
        assert (draws[i] - draws[j]).abs().min() > 0
    assert torch.equal(noise.draw(0, 5)[:, 0], draws[0])
    values = noise.draw(2, 60)
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03


def test_default_noise_is_that_of_seed_0() -> None:
    settings = {**SETTINGS, "num_iter": 2, "num_sampling_steps": 5}
    noise = ImageNoise(MODEL, 0, range(2), 5)
    assert torch.equal(
        sample_tokens(MODEL, LABELS[:2], **settings), sample_tokens(MODEL, LABELS[:2], **settings, noise=noise)
    )


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize("policy", [None, CachePolicy()], ids=["baseline", "lazy"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_low_precision_gives_float32_latents_close_to_float64(dtype: torch.dtype, policy: CachePolicy | None) -> None:
    def sample(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = cast_model(perturb(create_model("mar_base", **FIELDS), 0.02), dtype)
        noise = noise_for(model, 2, SETTINGS["num_sampling_steps"])
        return sample_tokens(model, LABELS[:2], **SETTINGS, cache=policy, noise=noise)

    latents = sample(dtype)
    assert latents.dtype == torch.float32 and latents.shape == (2, 4, 8, 8)
    assert relative_error(latents, sample(torch.float64)) < TOLERANCE[dtype]


def test_patchify_takes_tokens_row_by_row_with_channels_first() -> None:
    model = random_model(patch_size=2)  # 4 x 4 tokens of 4 x 2 x 2 numbers
    latents = torch.arange(2 * 4 * 8 * 8).reshape(2, 4, 8, 8).double()
    tokens = model.patchify(latents)
    assert tokens.shape == (2, 16, 16)
    assert torch.equal(tokens[1, 6], latents[1, :, 2:4, 4:6].flatten())  # second row of tokens, third column
    assert torch.equal(model.unpatchify(tokens), latents)


# The sampler's version


class SameNoiseEverywhere:
    """The orders of `ImageNoise`, and draws by NumPy, whose bits do not depend on the processor."""

    def __init__(self) -> None:
        self.orders = ImageNoise(MODEL, 5, range(2), SETTINGS["num_sampling_steps"]).orders

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
    noise = ImageNoise(create_model("mar_tiny"), 3, [0, 41], 100)
    assert noise.orders[:, :6].tolist() == [[91, 92, 140, 43, 211, 131], [147, 169, 48, 53, 19, 160]], IMAGES_CHANGE
    values = noise.draw(2, 5).flatten(2)[[0, 7, 100], :, 3].flatten().tolist()
    expected = [-0.208578, 0.235960, 0.770916, 0.354436, -1.382423, -0.825951]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5, msg=IMAGES_CHANGE)  # rounding is the processor's


# Bad arguments

BAD_ARGUMENTS = [
    ("num_iter", 0),
    ("num_iter", 65),
    ("cfg", 0.5),
    ("cfg", math.nan),
    ("cfg", math.inf),
    ("cfg_schedule", "cosine"),
    ("num_sampling_steps", 1),
    ("num_sampling_steps", 1001),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("class_labels", torch.empty(0, dtype=torch.long)),
    ("class_labels", torch.zeros(1, 1, dtype=torch.long)),
]


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS, ids=lambda value: str(value).replace("\n", ""))
def test_bad_arguments_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        sample_tokens(MODEL, **{"class_labels": LABELS, **SETTINGS, name: value})


def test_prune_layer_below_the_decoder_is_named() -> None:
    with pytest.raises(ValueError, match="prune_layer"):
        sample_tokens(MODEL, LABELS, **SETTINGS, cache=CachePolicy(prune_layer=5))


BAD_FIELDS = [
    ("start_step", -1),
    ("refresh_interval", 0),
    ("prune_layer", -1),
    ("min_margin", -1),
    ("head_refresh_interval", 0),
    ("head_skipped_blocks", (1, -2)),
    ("head_warmup", -0.1),
    ("head_warmup", 1.1),
    ("head_warmup", math.nan),
    ("refresh_steps", (3, -1)),
    ("head_refresh_interval", 1.5),
    ("selection", "likeness"),
    ("start_step", 1.5),
    ("start_step", math.inf),
    ("kept_fractions", ()),
    ("kept_fractions", ((1, 0.5),)),
    ("kept_fractions", ((0, 1.0), (9, 0.5), (9, 0.4))),
    ("kept_fractions", ((0, 1.0), (9, 0.5), (8, 0.4))),
    ("kept_fractions", ((0, 1.1),)),
    ("kept_fractions", ((0, 1.0), (9, -0.1))),
    ("kept_fractions", ((0, math.nan),)),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=str)
def test_policy_fields_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        CachePolicy(**{name: value})


BAD_SCHEDULES = [
    ("tokens_per_step", {"tokens_per_step": [60, 3]}),
    ("tokens_per_step", {"tokens_per_step": [64, 0]}),
    ("cfg", {"num_iter": 3, "cfg": [1.0, 2.0]}),
    ("cfg", {"num_iter": 2, "cfg": [1.0, 0.5]}),
]


@pytest.mark.parametrize(("name", "arguments"), BAD_SCHEDULES, ids=str)
def test_schedules_that_do_not_fit_are_named(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=name):
        mar_schedule(64, **arguments)


@pytest.mark.parametrize(
    ("labels", "noise", "named"),
    [
        (torch.tensor([0, 5]), (2, 21), "class_labels must be from 0 to 4"),
        (torch.tensor([-1, 2]), (2, 21), "class_labels must be from 0 to 4"),
        (torch.tensor([0.0, 1.0]), (2, 21), "class_labels must be a LongTensor"),
        (torch.tensor([0, 1]), (3, 21), "noise.orders"),
        (torch.tensor([0, 1]), (2, 10), "noise.draw"),
    ],
)
def test_labels_and_noise_that_do_not_fit_are_refused(labels, noise, named):
    batch, num_sampling_steps = noise
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        sample_tokens(MODEL, labels, **SETTINGS, noise=noise_for(MODEL, batch, num_sampling_steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_layers_change_no_more_than_rounding(dtype: torch.dtype) -> None:
    model = cast_model(perturb(create_model("mar_base", **FIELDS), 0.02), dtype)
    noise = noise_for(model, 2, SETTINGS["num_sampling_steps"])
    plain, packed = (
        sample_tokens(network, LABELS[:2], **SETTINGS, cache=CachePolicy(), noise=noise)
        for network in (model, pack_linear_layers(copy.deepcopy(model)))
    )
    assert relative_error(packed, plain) < TOLERANCE[dtype]
    assert not any(isinstance(layer, PackedLinear) for layer in model.modules())


def test_packing_leaves_names_and_weights() -> None:
    model = create_model("mar_base", **FIELDS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    after = pack_linear_layers(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(isinstance(layer, PackedLinear) == can_be_packed(layer) for layer in layers)
