"""The sampler against tensors recorded in float64 from the authors' implementation (MIT, commit 6c65efa).

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
from torch import Tensor

from diffusion.schedule import respaced_timesteps
from models import MAR, CachePolicy, create_model
from models.diffloss import timestep_sinusoids
from models.lazymar.sampler import SampledStep, Sampler

DATA = Path(__file__).parent / "data"
CASES = ("baseline", "lazy")


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


def recorded_run(
    case: str, recorded: dict, latents: Tensor, policy: CachePolicy | None = None
) -> Iterator[SampledStep]:
    """The case's run in the dtype of `latents`, which it fills in the end; `policy` replaces the case's own."""
    sampler = Sampler(
        load_model(latents.dtype),
        num_iter=int(recorded["num_iter"]),
        cfg=float(recorded["cfg"]),
        cfg_schedule=str(recorded["cfg_schedule"]),
        temperature=float(recorded["temperature"]),
        num_sampling_steps=100,
        cache=policy or (CachePolicy() if recorded["lazy"] else None),
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
    num_steps = 0
    for step in recorded_run(case, recorded, latents):
        errors = relative_errors(step.conditions.flatten(0, 1), recorded[f"z_{step.step.index}"])
        assert errors.mean() < 1e-9, f"conditions of step {step.step.index}"
        num_steps += 1
    assert num_steps == 64
    assert latent_errors(latents, recorded).mean() < 1e-9


@pytest.mark.parametrize("case", CASES)
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


@pytest.mark.parametrize("fields", MISTAKES, ids=str)
def test_mistakes_in_the_policy_are_seen(fields: dict) -> None:
    recorded = load_case("lazy")
    latents = torch.empty(recorded["latents"].shape, dtype=torch.float64)
    assert any(
        relative_errors(step.conditions.flatten(0, 1), recorded[f"z_{step.step.index}"]).mean() > 1e-6
        for step in recorded_run("lazy", recorded, latents, CachePolicy(**fields))
    )
