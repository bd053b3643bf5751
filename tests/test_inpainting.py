"""Sampling from known tokens computes what `naive.py` defines, by every method and with every cache."""

from dataclasses import replace

import naive
import pytest
import torch
from tools import GUIDANCE, LABELS, MODEL, SMALL, relative_error, short_settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import (
    MAR,
    CachePolicy,
    ImageNoise,
    Sampler,
    count_flops,
    create_model,
    find_method,
    sample_tokens,
)
from models.methods import stages_of_positions

POSITIONS, STAGES = torch.arange(64), torch.tensor(stages_of_positions(64, 3))
MASKS = {
    "left half": POSITIONS % 8 < 4,
    "one known": POSITIONS == 9,
    "few missing": (POSITIONS != 0) & (POSITIONS != 63) & (POSITIONS // 3 != 3),
    "first stage": STAGES == 0,
    "last stages": STAGES > 0,
    "last stage": STAGES == 2,
}


def known_latents(model: MAR, batch: int) -> Tensor:
    side = model.grid_size * model.patch_size
    latents = torch.randn(batch, model.vae_embed_dim, side, side, generator=torch.Generator().manual_seed(1))
    return 1e4 * latents.double()  # as large as what the random head makes


def settings_of(name: str, **changes) -> dict:
    """The settings of `Method` for a short run."""
    return {field: value for field, value in short_settings(name, **changes).items() if field not in GUIDANCE}


def sample_both(name: str, mask: Tensor, model: MAR = MODEL, batch: int = 1, **changes) -> tuple[Tensor, Tensor]:
    """The sampler's latents and those of the definition."""
    settings, method = short_settings(name, **changes), settings_of(name, **changes)
    run = {"known": (known_latents(model, batch), mask), "noise": ImageNoise(model, 5, range(batch), 22)}
    guidance = {setting: settings[setting] for setting in GUIDANCE}
    expected = naive.sample_tokens(model, LABELS[:batch], replace(find_method(name), **method), **guidance, **run)
    return sample_tokens(model, LABELS[:batch], method=name, **settings, **run), expected


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["mar", "lazymar", "lazymar+gtr", "fast"])
def test_known_tokens_begin_every_method(name: str, mask: Tensor) -> None:
    result, expected = sample_both(name, mask)
    assert result.isfinite().all() and relative_error(result, expected) < 1e-9
    tokens, given = MODEL.patchify(result), MODEL.patchify(known_latents(MODEL, 1))
    assert torch.equal(tokens[:, mask], given[:, mask])
    assert (tokens[:, ~mask] != given[:, ~mask]).all()


@pytest.mark.parametrize("name", ["disa", "recap+gtr", "lazymar+lateguidance"])
def test_other_methods_compute_the_definition_for_several_images(name: str) -> None:
    changes = {"num_iter": (3, 2, 2)} if "gtr" in name else {}
    result, expected = sample_both(name, torch.arange(16) % 4 < 2, SMALL, 3, **changes)
    assert relative_error(result, expected) < 1e-9


POLICIES = [
    {"selection": "random"},
    {"prune_layer": 0, "min_margin": 0, "recomputed_fractions": ((0, 0.0),), "start_step": 0, "refresh_interval": 100},
    {"prune_layer": 1, "condition_cache": False, "start_step": 1},
    {"token_cache": False, "start_step": 1},
    {"head_cache": False, "refresh_steps": (3, 60)},
]


@pytest.mark.parametrize("fields", POLICIES, ids=str)
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_any_cache_policy_computes_the_definition(fields: dict, cfg: float) -> None:
    result, expected = sample_both("mar", MASKS["left half"], cache=CachePolicy(**fields), cfg=cfg, batch=2)
    assert relative_error(result, expected) < 1e-9


def test_a_mask_without_known_tokens_changes_nothing() -> None:
    nothing = torch.zeros(64, dtype=torch.bool)
    noise, settings = ImageNoise(MODEL, 5, [0], 22), short_settings("fast") | {"method": "fast"}
    latents = sample_tokens(MODEL, LABELS[:1], **settings, known=(known_latents(MODEL, 1), nothing), noise=noise)
    assert torch.equal(latents, sample_tokens(MODEL, LABELS[:1], **settings, noise=noise))


@pytest.mark.parametrize("name", ["mar", "lazymar", "lazymar+gtr"])
def test_flops_are_those_of_pytorch(name: str) -> None:
    with torch.device("meta"):
        model = create_model(
            "mar_base", img_size=128, encoder_embed_dim=64, encoder_depth=2, encoder_num_heads=4, class_num=3,
            decoder_embed_dim=48, decoder_depth=5, decoder_num_heads=4, diffloss_d=6, diffloss_w=40,
        )  # fmt: skip
    settings, mask = {**settings_of(name), "method": name, "cfg": 3.0}, MASKS["left half"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        known = torch.zeros(1, 16, 8, 8, device="meta"), mask
        sample_tokens(model, torch.tensor([1]), **settings, known=known, noise=ImageNoise(model, 0, [0], 22))
    assert count_flops(model, known=mask, **settings).total == counter.get_total_flops() > 0


def test_a_kept_sampler_repeats_a_batch_and_needs_the_known_tokens() -> None:
    plan = replace(find_method("fast"), **settings_of("fast")).plan(MODEL, cfg=2.5, known=MASKS["left half"])
    sampler, latents = Sampler(MODEL, plan), known_latents(MODEL, 2)
    first = sampler(LABELS[:2], known=latents)
    assert sampler.is_warm(2) and torch.equal(sampler(LABELS[:2], known=latents), first)
    with pytest.raises(ValueError, match="known must be given"):
        sampler(LABELS[:2])


BAD_KNOWN = [
    (torch.zeros(63, dtype=torch.bool), (1, 4, 8, 8), "known must be a BoolTensor of 64 tokens"),
    (torch.zeros(64), (1, 4, 8, 8), "known must be a BoolTensor of 64 tokens, not torch.float32"),
    (torch.ones(64, dtype=torch.bool), (1, 4, 8, 8), "known must leave at least one token"),
    (MASKS["left half"], (2, 4, 8, 8), r"known must be latents \[1, 4, 8, 8\], not \[2, 4, 8, 8\]"),
]


@pytest.mark.parametrize(("mask", "shape", "said"), BAD_KNOWN, ids=[said for _, _, said in BAD_KNOWN])
def test_what_cannot_be_known_is_refused(mask: Tensor, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sample_tokens(MODEL, LABELS[:1], known=(torch.zeros(shape), mask))
