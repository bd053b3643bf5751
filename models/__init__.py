"""MAR, its presets, and sampling with LazyMAR and other methods."""

from typing import Any

from diffusion.solver import SolverSteps
from models.lazymar.noise import ImageNoise
from models.lazymar.plan import Plan, make_plan
from models.lazymar.policy import CachePolicy
from models.lazymar.sampler import Sampler
from models.lazymar.schedule import Schedule, mar_schedule
from models.linear import pack_linear_layers
from models.mar import MAR, cast_model
from models.methods import METHODS, AnnealedSteps, DetailedTokens, Method, count_flops, find_method, sample_tokens
from models.presets import PRESETS, Preset
from models.vae import AutoencoderKL

__all__ = [
    "MAR",
    "METHODS",
    "PRESETS",
    "AnnealedSteps",
    "AutoencoderKL",
    "CachePolicy",
    "DetailedTokens",
    "ImageNoise",
    "MARPipeline",
    "Method",
    "Plan",
    "Preset",
    "Sampler",
    "Schedule",
    "SolverSteps",
    "cast_model",
    "count_flops",
    "create_model",
    "find_method",
    "make_plan",
    "mar_schedule",
    "pack_linear_layers",
    "sample_tokens",
]


def __getattr__(name: str) -> Any:
    """Import `MARPipeline` when it is first asked for: it needs `util`, which needs this package."""
    if name == "MARPipeline":
        from util.pipeline import MARPipeline

        return MARPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def create_model(name: str, **overrides: Any) -> MAR:
    """A preset's network in eval mode, with random weights.

    Args:
        name:      a key of `PRESETS`.
        overrides: constructor fields of `MAR` that replace the preset's.

    Raises ValueError for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(PRESETS)}")
    model = MAR(**{**PRESETS[name].architecture, **overrides}).eval()
    model.name = name
    return model
