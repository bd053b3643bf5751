"""The sampler against tensors recorded in float64 from the authors' implementations (MIT).

The annealed case is from DiSA's (commit 283fa59), the others are from LazyMAR's (commit 6c65efa).

The time embedding's sinusoids were correctly rounded to float32, as ours are: one ulp more or less shows as 5e-5 here.
`data/model.safetensors` is a small MAR of the paper's geometry; `data/case_*.npz` hold a run's settings, its orders,
the conditions `z_<step>` and the latents. Noise is made from the case's and the step's name.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tools import make_sampler
from torch import Tensor

from diffusion.schedule import respaced_timesteps
from models import MAR, AnnealedSteps, CachePolicy, create_model
from models.diffloss import timestep_sinusoids
from models.lazymar.sampler import SampledStep

DATA = Path(__file__).parent / "data"
CASES = ("baseline", "lazy", "annealed")


class RecordedNoise:
    def __init__(self, case: str, orders: np.ndarray) -> None:
        self.case, self.orders = case, torch.from_numpy(orders.astype(np.int64))

    def draw(self, step: int, num_tokens: int) -> Tensor:
        state = np.random.RandomState(zlib.crc32(f"noise/{self.case}/{step}".encode()))
        return torch.from_numpy(state.standard_normal((101, len(self.orders), num_tokens, 16)).astype(np.float32))


def load_model(dtype: torch.dtype) -> MAR:
    model = create_model(
        "mar_base",
        encoder_embed_dim=64,
        encoder_depth=6,
        encoder_num_heads=4,
        decoder_embed_dim=64,
        decoder_depth=6,
        decoder_num_heads=4,
        class_num=10,
        diffloss_d=6,
        diffloss_w=64,
    )
    model.load_state_dict(load_file(DATA / "model.safetensors"), strict=True)
    return model.to(dtype)


def load_case(case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"case_{case}.npz", allow_pickle=False) as file:
        return dict(file)


def recorded_run(case: str, recorded: dict, latents: Tensor, **replaced: object) -> Iterator[SampledStep]:
    """The case's run in the dtype of `latents`, which it fills in the end; settings may replace the case's own."""
    num_sampling_steps: int | AnnealedSteps = 100
    if "annealing" in recorded:
        limits = int(recorded["upper_steps"]), int(recorded["lower_steps"])
        num_sampling_steps = AnnealedSteps(*limits, str(recorded["annealing"]))
    own = {"num_sampling_steps": num_sampling_steps, "cache": CachePolicy() if recorded["lazy"] else None}
    sampler = make_sampler(
        load_model(latents.dtype),
        num_iter=int(recorded["num_iter"]),
        cfg=float(recorded["cfg"]),
        cfg_schedule=str(recorded["cfg_schedule"]),
        temperature=float(recorded["temperature"]),
        **{**own, **replaced},
    )
    noise = RecordedNoise(case, recorded["orders"])
    yield from sampler.steps(torch.from_numpy(recorded["labels"]), noise, latents)


def relative_errors(result: Tensor, expected: np.ndarray) -> Tensor:
    """|result - expected| / |expected| of each row."""
    reference = torch.from_numpy(expected)
    return (result.double() - reference).norm(dim=-1) / reference.norm(dim=-1)


def latent_errors(latents: Tensor, recorded: dict) -> Tensor:
    return relative_errors(latents.movedim(1, -1), np.moveaxis(recorded["latents"], 1, -1))


def test_the_sinusoids_have_the_same_bits_on_every_processor() -> None:
    sinusoids = timestep_sinusoids(torch.tensor(respaced_timesteps(100)))
    assert sinusoids.shape == (100, 256)
    digest = hashlib.sha256(sinusoids.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e4f49c8dfd8c76f540077034366d1e0f7e0f0e3ccb19d7020a96322160e3eebe"


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_the_latents_equal_the_authors(case: str) -> None:
    recorded = load_case(case)
    latents = torch.empty(recorded["latents"].shape, dtype=torch.float64)
    denoising_steps = []
    for step in recorded_run(case, recorded, latents):
        errors = relative_errors(step.conditions.flatten(0, 1), recorded[f"z_{step.step.index}"])
        assert errors.mean() < 1e-9, f"conditions of step {step.step.index}"
        denoising_steps.append(len(step.step.chains[0][0].steps))
    assert denoising_steps == recorded.get("denoising_steps", np.full(64, 100)).tolist()
    assert latent_errors(latents, recorded).mean() < 1e-9


@pytest.mark.parametrize("case", ["baseline", "lazy"])
def test_float32_agrees_at_the_median_token(case: str) -> None:
    recorded = load_case(case)
    latents = torch.empty(recorded["latents"].shape, dtype=torch.float32)
    for _ in recorded_run(case, recorded, latents):
        pass
    assert latent_errors(latents, recorded).median() < 3e-5


MISTAKES = [
    {"start_step": 4},
    {"start_step": 6},
    {"refresh_interval": 8},
    {"refresh_interval": 10},
    {"prune_layer": 2},
    {"prune_layer": 4},
    {"kept_fractions": ((0, 1.0), (20, 0.6), (21, 0.51))},
    {"kept_fractions": ((0, 1.0), (19, 0.6), (21, 0.5))},
    {"min_margin": 14},
    {"min_margin": 16},
    {"head_refresh_interval": 6},
    {"head_refresh_interval": 8},
    {"head_skipped_blocks": (1, 2, 3)},
    {"head_skipped_blocks": (0, 1, 2, 3, 4)},
    {"head_warmup": 0.89},
    {"head_warmup": 0.92},  # step 91 of 100 is a refresh of the head
    {"token_cache": False},
    {"condition_cache": False},
    {"head_cache": False},
]


def is_seen(case: str, **replaced: object) -> bool:
    """Whether a run with other settings has other conditions, at the first step where it has."""
    recorded = load_case(case)
    latents = torch.empty(recorded["latents"].shape, dtype=torch.float64)
    return any(
        relative_errors(step.conditions.flatten(0, 1), recorded[f"z_{step.step.index}"]).mean() > 1e-6
        for step in recorded_run(case, recorded, latents, **replaced)
    )


@pytest.mark.parametrize("fields", MISTAKES, ids=str)
def test_mistakes_in_the_policy_are_seen(fields: dict) -> None:
    assert is_seen("lazy", cache=CachePolicy(**fields))


ANNEALING_MISTAKES = [
    {"schedule": "cosine"},
    {"schedule": "two-stage"},
    {"schedule": "constant"},
    {"upper": 51},
    {"lower": 6},
]


@pytest.mark.parametrize("fields", ANNEALING_MISTAKES, ids=str)
def test_mistakes_in_the_annealing_are_seen(fields: dict) -> None:
    assert is_seen("annealed", num_sampling_steps=AnnealedSteps(**{"upper": 50, "lower": 5, **fields}))


@pytest.mark.parametrize("first_timestep", [999, 951])
def test_chains_that_begin_elsewhere_are_seen(first_timestep: int, monkeypatch) -> None:
    monkeypatch.setattr("models.methods.ANNEALED_FIRST_TIMESTEP", first_timestep)
    assert is_seen("annealed")
