"""Small models with strong random weights, short settings, and what several tests of the sampler share."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from models import (
    MAR,
    METHODS,
    AnnealedSteps,
    CachePolicy,
    DetailedTokens,
    ImageNoise,
    Method,
    Sampler,
    SolverSteps,
    create_model,
)
from models.methods import with_settings
from models.presets import architecture

LABELS = torch.tensor([3, 0, 4])
GUIDANCE = {"cfg": 2.5, "cfg_schedule": "linear", "temperature": 0.9}
SETTINGS = {**GUIDANCE, "num_iter": 16, "num_sampling_steps": 21}
# What fits a run of 7 to 9 steps, in place of what the methods have for 64 or 32.
SHORT = {
    "mar": {"num_iter": 9, "num_sampling_steps": 9},
    "lazymar": {"cache": CachePolicy(start_step=2, refresh_interval=4)},
    "disa": {"num_sampling_steps": AnnealedSteps(12, 3)},
    "gtr": {"num_stages": 3, "num_iter": (3, 2, 2), "detailed_tokens": DetailedTokens(0.2, 9)}
    | {"num_sampling_steps": AnnealedSteps(12, 5, "generation")},
    "recap": {"cache": METHODS["recap"].cache, "lazy_sampling_steps": 6},
    "lateguidance": {"unguided_below": 1.4},
}
SHORT["fast"] = SHORT["lateguidance"] | SHORT["lazymar"]
SHORT["fast"] |= {"num_stages": 3, "num_iter": (3, 2, 2), "num_sampling_steps": SolverSteps(5)}
FIELDS = architecture(
    32, 4, 4, 6, 32, decoder_depth=5, class_num=5, buffer_size=8, img_size=32, vae_stride=4, vae_embed_dim=4
)


def perturb(model: MAR, std: float) -> MAR:
    """Add noise to every parameter: a new head is the identity, which would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def random_model(**overrides) -> MAR:
    """A float64 model of 64 tokens (unless overridden) with strong random weights."""
    model = create_model("mar_base", **{**FIELDS, **overrides}).double()
    for name, parameter in model.named_parameters():
        parameter.data.fill_(float(parameter.ndim == 1 and name.endswith("weight")))  # norms scale by 1
    perturb(model, 0.2)
    # An untrained head's tokens are of the order 1e4; unscaled they would drown the position embeddings.
    model.z_proj.weight.data *= 1e-4
    return model


def short_settings(name: str, **changes: Any) -> dict[str, Any]:
    """Settings for a short run of a method or a composition; `changes` may be of its cache policy too."""
    settings = GUIDANCE | SHORT["mar"]
    for part in name.split("+"):
        settings |= SHORT[part]
    if "cache" in settings:
        policy = settings["cache"]
        if "num_stages" in settings:  # its steps are then those of 64, not of 7
            start = policy.start_step if policy.start_step < 1 else 9 * policy.start_step
            policy = replace(policy, start_step=start, refresh_interval=9 * policy.refresh_interval)
        of_policy = {field.name: changes.pop(field.name) for field in fields(policy) if field.name in changes}
        settings["cache"] = replace(policy, **of_policy)
    return settings | changes


def make_sampler(model: MAR, method: Method | str = "mar", **settings: Any) -> Sampler:
    """A sampler for a method whose settings may be replaced, by default with the guidance of `GUIDANCE`."""
    settings = GUIDANCE | settings
    cfg, cfg_schedule = settings.pop("cfg"), settings.pop("cfg_schedule")
    return Sampler(model, with_settings(model, method, settings).plan(model, cfg=cfg, cfg_schedule=cfg_schedule))


def batch_of(model: MAR, size: int, seed: int = 5, num_sampling_steps: int = 21) -> tuple[Tensor, ImageNoise]:
    """The labels and the noise of a batch that differs from seed to seed."""
    return LABELS.roll(seed)[:size], ImageNoise(model, seed, range(size), num_sampling_steps + 1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Mean over tokens [B, C, h, w] of |result - expected| / |expected|."""
    return ((result - expected).norm(dim=1) / expected.norm(dim=1)).mean().item()


MODEL = random_model()
SMALL = random_model(patch_size=2)  # 16 tokens
