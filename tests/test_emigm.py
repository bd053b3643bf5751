"""eMIGM's models and sampler against tensors recorded in float64 from the authors' code (MIT).

`data/emigm/model.safetensors` has random weights in the official format; the cases hold a run's settings, its orders
and the conditions of three steps, of the conditional branch. Only the first draw of the noise is used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_methods import assert_equal_to_naive
from test_reference import RecordedNoise, latent_errors, relative_errors
from tools import LABELS, SMALL, random_model, relative_error
from torch import Tensor

import diffusion.solver
from diffusion.solver import RULES
from models import MAR, METHODS, CachePolicy, ImageNoise, Method, Sampler, SolverSteps, create_model, sample_tokens

DATA = Path(__file__).parent / "data" / "emigm"
CASES = ("16x8", "64x14")


def load_model() -> MAR:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
             (("embed_dim", 64), ("depth", 5), ("num_heads", 4))}  # fmt: skip
    model = create_model("emigm_small", **sizes, class_num=10, diffloss_d=4, diffloss_w=64)
    model.load_state_dict(load_file(DATA / "model.safetensors"), strict=True)
    return model.double()


def load_case(case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"case_emigm_{case}.npz", allow_pickle=False) as file:
        return dict(file)


def recorded_method(recorded: dict) -> Method:
    return Method(
        tokens_per_step=tuple(np.diff(recorded["known"]).tolist()),
        num_sampling_steps=SolverSteps(int(recorded["solver_steps"]), "singlestep"),
        guidance_interval=(float(recorded["guided_above"]), float(recorded["guided_up_to"])),
    )


def run(case: str, method: Method) -> tuple[Tensor, list[float]]:
    """Return latents, and the relative errors of the conditions of the recorded steps and of the latents."""
    recorded, model = load_case(case), load_model()
    plan = method.plan(model, cfg=float(recorded["cfg"]), cfg_schedule="constant")
    labels = torch.from_numpy(recorded["labels"])
    latents, errors = torch.empty(recorded["latents"].shape, dtype=torch.float64), []
    names = {0: "first", len(plan) // 2: "middle", len(plan) - 1: "last"}
    noise = RecordedNoise(f"emigm_{case}", recorded["orders"])
    for step in Sampler(model, plan).steps(labels, noise, latents):
        if step.step.index in names:
            expected = recorded[f"conditions_{names[step.step.index]}"]
            errors.append(relative_errors(step.conditions[: len(labels)], expected).max().item())
    return latents, [*errors, latent_errors(latents, recorded).max().item()]


@pytest.mark.parametrize("case", CASES)
def test_conditions_and_latents_equal_the_authors(case: str) -> None:
    recorded = load_case(case)
    method = recorded_method(recorded)
    plan = method.plan(load_model(), cfg=float(recorded["cfg"]), cfg_schedule="constant")
    assert [step.cfg for step in plan] == recorded["cfg_per_step"].tolist()
    assert max(run(case, method)[1]) < 1e-9


MISTAKES = [
    {"num_sampling_steps": SolverSteps(7, "singlestep")},
    {"num_sampling_steps": SolverSteps(8)},
    {"guidance_interval": (0.13, 0.3)},
    {"guidance_interval": (0.1, 0.24)},
]


@pytest.mark.parametrize("changes", MISTAKES, ids=str)
def test_mistakes_are_seen(changes: dict) -> None:
    assert max(run("16x8", recorded_method(load_case("16x8")).replaced(**changes))[1]) > 1e-7


@pytest.mark.parametrize("lowest", [-5.5, -5.0])
def test_another_cut_of_the_noise_schedule_is_seen(lowest: float, monkeypatch) -> None:
    monkeypatch.setattr("diffusion.solver.LOWEST_LOG_SNR", lowest)
    diffusion.solver._solution.cache_clear()
    errors = run("16x8", recorded_method(load_case("16x8")))[1]
    diffusion.solver._solution.cache_clear()
    assert max(errors) > 1e-7


# Against the definition

SOLVERS = [SolverSteps(count, rule) for rule in RULES for count in (2, 3, 4, 6, 8)]


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("steps", SOLVERS, ids=str)
def test_solvers_on_mar(steps: SolverSteps, cfg: float) -> None:
    assert_equal_to_naive("mar", model=SMALL, batch=2, num_iter=3, num_sampling_steps=steps, cfg=cfg, temperature=0.8)


@pytest.mark.parametrize("name", ["lazymar", "gtr", "recap", "lateguidance", "lazymar+gtr+lateguidance", "fast"])
def test_a_solver_under_every_order_cache_and_guidance(name: str) -> None:
    assert_equal_to_naive(name, batch=2, num_sampling_steps=SolverSteps(7))


@pytest.mark.parametrize("changes", [{}, {"num_iter": 8}, {"guidance_interval": (0.35, 0.9)}], ids=str)
@pytest.mark.parametrize("caches", [{}, {"condition_cache": False}, {"token_cache": False}], ids=str)
def test_emigm_with_lazymar(changes: dict, caches: dict) -> None:
    cache = CachePolicy(start_step=8, refresh_interval=14, **caches)  # of 64 steps
    settings = {**METHODS["emigm"].changes, "cache": cache, "num_iter": 12, **changes}
    assert_equal_to_naive("lazymar", model=random_model(one_fake_token=True), **settings)


def test_tokens_per_step_and_an_interval_compose() -> None:
    settings = {"tokens_per_step": (1, 2, 5, 4, 4), "guidance_interval": (0.1, 0.7)}
    assert_equal_to_naive("lazymar", model=SMALL, batch=3, **settings)


def test_temperature_scales_the_initial_noise_alone() -> None:
    class Scaled(ImageNoise):
        def draw(self, step: int, num_tokens: int) -> Tensor:
            return 0.5 * super().draw(step, num_tokens)

    settings = {"num_iter": 4, "num_sampling_steps": SolverSteps(6)}
    scaled = sample_tokens(SMALL, LABELS, noise=Scaled(SMALL, 3, range(3), 0), **settings)
    colder = sample_tokens(SMALL, LABELS, noise=ImageNoise(SMALL, 3, range(3), 0), temperature=0.5, **settings)
    assert relative_error(scaled, colder) < 1e-12
