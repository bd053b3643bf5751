"""Small models with strong random weights, and what several tests of the sampler share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models import MAR, Method, Sampler, create_model, find_method

LABELS = torch.tensor([3, 0, 4])
GUIDANCE = {"cfg": 2.5, "cfg_schedule": "linear", "temperature": 0.9}
SETTINGS = {**GUIDANCE, "num_iter": 16, "num_sampling_steps": 21}
FIELDS = {
    "img_size": 32,
    "vae_stride": 4,
    "vae_embed_dim": 4,
    "buffer_size": 8,
    "encoder_embed_dim": 32,
    "encoder_depth": 4,
    "encoder_num_heads": 4,
    "decoder_embed_dim": 32,
    "decoder_depth": 5,
    "decoder_num_heads": 4,
    "class_num": 5,
    "diffloss_d": 6,
    "diffloss_w": 32,
}


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


def make_sampler(
    model: MAR,
    method: Method | str = "mar",
    *,
    cfg: float = 3.25,
    cfg_schedule: str = "linear",
    temperature: float = 1.0,
    **settings: Any,
) -> Sampler:
    """A sampler for a method whose settings may be replaced."""
    method = (find_method(method) if isinstance(method, str) else method).replaced(**settings)
    return Sampler(model, method.plan(model, cfg=cfg, cfg_schedule=cfg_schedule), temperature=temperature)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Mean over tokens [B, C, h, w] of |result - expected| / |expected|."""
    return ((result - expected).norm(dim=1) / expected.norm(dim=1)).mean().item()


MODEL = random_model()
SMALL = random_model(patch_size=2)  # 16 tokens
