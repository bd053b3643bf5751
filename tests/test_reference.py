"""The sampler against tensors recorded in float64 from the authors' implementations (MIT).

The annealed case is from DiSA's (commit 283fa59), the others are from LazyMAR's (commit 6c65efa).

The time embedding's sinusoids were correctly rounded to float32, as ours are: one ulp more or less shows as 5e-5 here.
`data/model.safetensors` is a small MAR of the paper's geometry; `data/case_*.npz` hold a run's settings, its orders,
the conditions `z_<step>` and the latents. Noise is made from the case's and the step's name.
"""

import functools
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
from models.lazymar.plan import Step

DATA = Path(__file__).parent / "data"


class RecordedNoise:
    def __init__(self, case: str, orders: np.ndarray) -> None:
        self.case, self.orders = case, torch.from_numpy(orders.astype(np.int64))

    def draw(self, step: int, num_tokens: int) -> Tensor:
        state = np.random.RandomState(zlib.crc32(f"noise/{self.case}/{step}".encode()))
        return torch.from_numpy(state.standard_normal((101, len(self.orders), num_tokens, 16)).astype(np.float32))


@functools.cache
def load_model(dtype: torch.dtype) -> MAR:
    sizes = {"embed_dim": 64, "depth": 6, "num_heads": 4}
    architecture = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}
    model = create_model("mar_base", **architecture, class_num=10, diffloss_d=6, diffloss_w=64)
    model.load_state_dict(load_file(DATA / "model.safetensors"), strict=True)
    return model.to(dtype)


@functools.cache
def load_case(case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"case_{case}.npz", allow_pickle=False) as file:
        return dict(file)


def relative_errors(result: Tensor, expected: np.ndarray) -> Tensor:
    """|result - expected| / |expected| of each row."""
    reference = torch.from_numpy(expected)
    return (result.double() - reference).norm(dim=-1) / reference.norm(dim=-1)


def errors(case: str, dtype: torch.dtype = torch.float64, **replaced: object) -> Iterator[tuple[Step | None, Tensor]]:
    """The errors of each step's conditions and, in the end, of the latents; settings may replace the case's own."""
    recorded = load_case(case)
    run = {name: recorded[name].item() for name in ("num_iter", "cfg", "cfg_schedule", "temperature")}
    own = {"num_sampling_steps": 100, "cache": CachePolicy() if recorded["lazy"] else None}
    if "annealing" in recorded:
        names = ("upper_steps", "lower_steps", "annealing")
        own["num_sampling_steps"] = AnnealedSteps(*(recorded[name].item() for name in names))
    sampler = make_sampler(load_model(dtype), **run, **{**own, **replaced})
    latents = torch.empty(recorded["latents"].shape, dtype=dtype)
    noise = RecordedNoise(case, recorded["orders"])
    for step, _, conditions, _ in sampler.steps(torch.from_numpy(recorded["labels"]), noise, latents):
        yield step, relative_errors(conditions.flatten(0, 1), recorded[f"z_{step.index}"])
    yield None, relative_errors(latents.movedim(1, -1), np.moveaxis(recorded["latents"], 1, -1))


def test_the_sinusoids_have_the_same_bits_on_every_processor() -> None:
    sinusoids = timestep_sinusoids(torch.tensor(respaced_timesteps(100)))
    assert sinusoids.shape == (100, 256)
    digest = hashlib.sha256(sinusoids.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e4f49c8dfd8c76f540077034366d1e0f7e0f0e3ccb19d7020a96322160e3eebe"


@pytest.mark.parametrize("case", ["baseline", "lazy", "annealed"])
def test_every_step_and_the_latents_equal_the_authors(case: str) -> None:
    *of_steps, (_, of_latents) = errors(case)
    assert all(of_conditions.mean() < 1e-9 for _, of_conditions in of_steps) and of_latents.mean() < 1e-9
    denoising_steps = [len(step.head_plans[0][0].kinds) for step, _ in of_steps]
    assert denoising_steps == load_case(case).get("denoising_steps", np.full(64, 100)).tolist()


def test_float32_agrees_at_the_median_token() -> None:
    *_, (_, of_latents) = errors("lazy", torch.float32)
    assert of_latents.median() < 3e-5


MISTAKES = {
    "start_step": [4, 6],
    "refresh_interval": [8, 10],
    "prune_layer": [2, 4],
    "recomputed_fractions": [((0, 1.0), (20, 0.6), (21, 0.51)), ((0, 1.0), (19, 0.6), (21, 0.5))],
    "min_margin": [14, 16],
    "head_refresh_interval": [6, 8],
    "head_skipped_blocks": [(1, 2, 3), (0, 1, 2, 3, 4)],
    "head_warmup": [0.89, 0.92],  # step 91 of 100 is a refresh of the head
    "token_cache": [False],
    "condition_cache": [False],
    "head_cache": [False],
}


def is_seen(case: str, **replaced: object) -> bool:
    """Whether a run with other settings has other conditions or latents, at the first step where it has."""
    return any(error.mean() > 1e-6 for _, error in errors(case, **replaced))


@pytest.mark.parametrize("field", MISTAKES)
def test_mistakes_in_the_policy_are_seen(field: str) -> None:
    for value in MISTAKES[field]:
        assert is_seen("lazy", cache=CachePolicy(**{field: value})), value


@pytest.mark.parametrize("given", [(50, 5, "cosine"), (51, 5), (50, 6)])
def test_mistakes_in_the_annealing_are_seen(given: tuple) -> None:
    assert is_seen("annealed", num_sampling_steps=AnnealedSteps(*given))


@pytest.mark.parametrize("first_timestep", [999, 951])
def test_chains_that_begin_elsewhere_are_seen(first_timestep: int, monkeypatch) -> None:
    monkeypatch.setattr("models.methods.ANNEALED_FIRST_TIMESTEP", first_timestep)
    assert is_seen("annealed")
