"""What CUDA asks of the sampler: on a GPU, and without one on tensors of the meta device, which have no values.

`pytest tests/test_cuda.py -rs` on a machine with a GPU runs all of it.
"""

from collections.abc import Callable

import pytest
import torch
from tools import FIELDS, LABELS, make_sampler, perturb, random_model, relative_error, short_settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import MAR, AnnealedSteps, ImageNoise, cast_model, create_model, sample_tokens
from models.diffloss import timestep_sinusoids
from models.lazymar.graphs import CudaCapture

GPU = torch.device("cuda", 0)
# As few steps as have each of their kinds: refreshes, lazy steps that prune rows; full, warm-up and reuse steps.
FEW_BLOCKS = {**FIELDS, "encoder_depth": 1, "diffloss_d": 3, "decoder_embed_dim": 48}
FEW_STEPS = {"start_step": 1, "refresh_interval": 3, "head_warmup": 0.5}
FEW = {
    "mar": {"num_iter": 2, "num_sampling_steps": 3},
    "lazymar": {"num_iter": 4, "num_sampling_steps": 7, **FEW_STEPS},
    "lazymar+gtr+lateguidance": {"num_iter": (2, 2, 1), "num_sampling_steps": AnnealedSteps(4, 3), **FEW_STEPS},
}
every_kind = pytest.mark.parametrize("name", FEW)


class NoValues:
    """Noise without values. Orders come from the host, as those of `ImageNoise` do."""

    def __init__(self, model: MAR, size: int) -> None:
        self.orders = torch.empty(size, model.seq_len, dtype=torch.long)
        self.size, self.token_dim, self.device = size, model.token_dim, model.mask_token.device

    def draw(self, step: int, num_tokens: int) -> Tensor:
        return torch.empty(22, self.size, num_tokens, self.token_dim, device=self.device)


# What CUDA could not capture, asked of tensors on the meta device: where an operation needs a value, it is an error

ILLEGAL = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class Legal(TorchDispatchMode):
    """Notes operations that draw random numbers, depend on values, or touch tensors on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.illegal, self.count = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        by_numbers = func.__name__ == "index.Tensor" and not any(x.dtype == torch.bool for x in tensors)
        tags = [tag for tag in func.tags if tag in ILLEGAL and not by_numbers]
        if tags or any(not tensor.is_meta for tensor in tensors):
            self.illegal.add(func.__name__)
        self.count += 1
        return result


@every_kind
def test_the_loop_waits_for_no_value_and_captured_functions_hold_nothing_that_cuda_cannot_capture(name: str) -> None:
    legal = Legal()

    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with legal:
            return (lambda: None), function()

    with torch.device("meta"):
        model = create_model("mar_base", **FEW_BLOCKS)
    sampler = make_sampler(model, name, **short_settings(name, **FEW[name]))
    sampler.make_capture = lambda: capture
    for _ in range(2):  # the second batch is captured
        steps = list(sampler.steps(LABELS[:2], NoValues(model, 2), sampler.empty_latents(2)))
    assert len(steps) == len(sampler.plan) and legal.count > 500 and not legal.illegal


# On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RUNS = {name: short_settings(name) for name in ("mar", "lazymar", "disa+recap+lateguidance", "lazymar+gtr", "fast")}
RUNS["random rows"] = short_settings("lazymar", selection="random")
every_run = pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)


def noise_for(model: MAR, seed: int, size: int, device: str = "cuda") -> ImageNoise:
    return ImageNoise(model, seed, range(size), 13, device)


@needs_gpu
@every_run
def test_float64_latents_are_those_of_the_cpu(settings: dict) -> None:
    model = random_model()
    noise = noise_for(model, 0, 3, "cpu")
    expected = sample_tokens(model, LABELS, **settings, noise=noise)
    result = sample_tokens(model.cuda(), LABELS, **settings, noise=noise).cpu()
    assert relative_error(result, expected) < 1e-9


@needs_gpu
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


@needs_gpu
@every_run
@pytest.mark.parametrize("batches_before", [0, 2], ids=["as it stands", "replayed"])
def test_the_loop_never_waits_for_the_device(batches_before: int, settings: dict) -> None:
    model = random_model().cuda()
    sampler = make_sampler(model, **settings)
    for _ in range(batches_before):
        sampler(LABELS, noise_for(model, 0, 3))
    latents = sampler.empty_latents(3)
    steps = sampler.steps(LABELS, noise_for(model, 0, 3), latents)
    next(steps)  # a batch brings its labels and orders from the host
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latents.isfinite().all()


@needs_gpu
def test_noise_on_a_gpu_depends_on_the_image_alone() -> None:
    several, alone = (ImageNoise(random_model(), 0, indices, 11, "cuda").draw(3, 4) for indices in ([5, 7], [7]))
    torch.testing.assert_close(several[:, 1:], alone, rtol=0, atol=0)


@needs_gpu
def test_sinusoids_have_the_bits_of_the_cpu() -> None:
    timesteps = torch.arange(1000)
    assert torch.equal(timestep_sinusoids(timesteps.cuda()).cpu(), timestep_sinusoids(timesteps))
