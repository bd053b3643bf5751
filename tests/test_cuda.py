"""What only a GPU can show: `pytest tests/test_cuda.py -rs` on a machine with one."""

from __future__ import annotations

import pytest
import torch
from test_methods import short_settings
from tools import FIELDS, GUIDANCE, LABELS, SETTINGS, make_sampler, perturb, random_model, relative_error
from torch import Tensor
from util.job.progress import StepProgress

from models import CachePolicy, ImageNoise, cast_model, create_model, sample_tokens
from models.diffloss import timestep_sinusoids
from models.lazymar.graphs import CudaCapture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RUNS = {
    "baseline": SETTINGS,
    "lazy": {**SETTINGS, "cache": CachePolicy()},
    "random rows": {**SETTINGS, "cache": CachePolicy(selection="random")},
    **{name: {**GUIDANCE, **short_settings(name)} for name in ("disa+recap+lateguidance", "lazymar+gtr", "fast")},
}
every_run = pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)


def noise_for(model, seed: int, size: int, device: str = "cuda") -> ImageNoise:
    return ImageNoise(model, seed, range(size), SETTINGS["num_sampling_steps"], device)


@every_run
def test_float64_latents_are_those_of_the_cpu(settings: dict) -> None:
    model = random_model()
    noise = noise_for(model, 0, 3, "cpu")
    expected = sample_tokens(model, LABELS, **settings, noise=noise)
    result = sample_tokens(model.cuda(), LABELS, **settings, noise=noise).cpu()
    assert relative_error(result, expected) < 1e-9


@every_run
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_replayed_graphs_give_the_latents_of_the_plain_sampler(dtype: torch.dtype, settings: dict) -> None:
    torch.manual_seed(0)
    model = cast_model(perturb(create_model("mar_base", **FIELDS), 0.02), dtype).cuda()
    sampler = make_sampler(model, **settings)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for seed, size in enumerate([2, 2, 2, 2, 3, 2, 2, 2]):
        labels, noise = LABELS.roll(seed)[:size], noise_for(model, seed, size)
        expected = sample_tokens(model, labels, **settings, noise=noise)
        result = sampler(labels, noise)
        assert sampler.make_capture.func is CudaCapture  # it did not give up
        assert relative_error(result.double(), expected.double()) < tolerance


@every_run
@pytest.mark.parametrize("batches_before", [0, 2], ids=["as it stands", "replayed"])
def test_the_loop_never_waits_for_the_device(batches_before: int, settings: dict) -> None:
    model = random_model().cuda()
    sampler = make_sampler(model, **settings)
    for _ in range(batches_before):
        sampler(LABELS, noise_for(model, 0, 3))
    latents = torch.empty(3, model.vae_embed_dim, 8, 8, dtype=torch.float64, device="cuda")
    steps = sampler.steps(LABELS, noise_for(model, 0, 3), latents)
    next(steps)  # a batch brings its labels and orders from the host
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latents.isfinite().all()


def test_noise_on_a_gpu_depends_on_the_image_alone() -> None:
    model = create_model("mar_tiny")

    def draw(indices: list[int]) -> Tensor:
        return ImageNoise(model, 0, indices, 10, "cuda").draw(3, 4)

    torch.testing.assert_close(draw([5, 7])[:, 1:], draw([7]), rtol=0, atol=0)


def test_steps_count_once_the_device_has_done_them() -> None:
    model = random_model().cuda()
    steps = StepProgress(3, [1] * SETTINGS["num_iter"], torch.device("cuda"))
    sampler = make_sampler(model, **SETTINGS)
    for seed in range(3):  # eager, captured, replayed
        sampler(LABELS, noise_for(model, seed, 3), steps)
        torch.cuda.synchronize()
        assert steps.images() == pytest.approx(3)


def test_sinusoids_have_the_bits_of_the_cpu() -> None:
    timesteps = torch.arange(1000)
    assert torch.equal(timestep_sinusoids(timesteps.cuda()).cpu(), timestep_sinusoids(timesteps))
