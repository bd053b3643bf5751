"""What CUDA asks of the sampler: on a GPU, and without one on tensors that have a device and a shape, but no values.

`pytest tests/test_cuda.py -rs` on a machine with a GPU runs all of it. PyTorch's CUDA build knows without one which
operations mix devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch_fidelity
from tools import FIELDS, LABELS, make_sampler, perturb, random_model, relative_error, short_settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import MAR, AnnealedSteps, AutoencoderKL, ImageNoise, cast_model, create_model, sample_tokens
from models.diffloss import timestep_sinusoids
from models.lazymar.graphs import CudaCapture
from util.extractors import FEATURES_DIMS, Extractor
from util.images import decode, map_images, to_uint8

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


# Where every tensor of a GPU run would be


def follows_devices() -> bool:
    """Whether this build of PyTorch can: one without CUDA cannot, and 2.8 asks a GPU even to slice a tensor."""
    with FakeTensorMode():
        try:
            x = torch.empty(1, 1, 3, 3, device=GPU)
            nn.functional.conv2d(x[:, :1], x)
        except (RuntimeError, AssertionError):
            return False
    return True


@pytest.fixture
def no_values() -> Iterator[FakeTensorMode]:
    if not follows_devices():
        pytest.skip("this build of PyTorch asks a GPU where tensors would be")
    with FakeTensorMode() as mode:
        yield mode


def on_gpu(make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """What `make` returns, with tensors without values in place of its own."""
    with unset_fake_temporarily(), torch.device("meta"):
        network = make().eval()
    for module in network.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=GPU)
                is_parameter = name in module._parameters
                setattr(module, name, nn.Parameter(empty, requires_grad=False) if is_parameter else empty)
    return network


@every_kind
def test_the_whole_loop_stays_on_the_gpu(no_values, name: str) -> None:
    model = cast_model(on_gpu(lambda: create_model("mar_base", **FEW_BLOCKS)), torch.bfloat16)
    sampler = make_sampler(model, name, **short_settings(name, **FEW[name]))
    sampler.make_capture = None
    labels = torch.empty(2, dtype=torch.long, device=GPU)
    with torch.inference_mode():  # `steps` asks whether the labels are in range, which takes their values
        for sampled in sampler._steps(labels, NoValues(model, 2), sampler.empty_latents(2)):
            assert sampled.conditions.device == sampled.tokens.device == GPU
            assert sampled.conditions.dtype == torch.bfloat16 and sampled.tokens.dtype == torch.float32
    assert sampled.step.index == len(sampler.plan) - 1


def test_decoded_images_and_their_features_stay_on_the_gpu(no_values, tmp_path, monkeypatch) -> None:
    vae, latents = on_gpu(AutoencoderKL, torch.bfloat16), torch.empty(2, 16, 16, 16, device=GPU)
    images = decode(vae, latents)
    assert (images.shape, images.dtype, images.device) == ((2, 3, 256, 256), torch.float32, GPU)
    pixels = to_uint8(images)
    assert (pixels.shape, pixels.dtype, pixels.device) == ((2, 3, 256, 256), torch.uint8, GPU)
    inception = torch_fidelity.FeatureExtractorInceptionV3
    monkeypatch.setattr(inception, "load_state_dict", lambda *_: None)
    monkeypatch.setattr("torch.load", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "to", lambda network, *_, **__: network)  # it cannot move what has no values
    (tmp_path / "weights.pth").touch()
    options = {"feature_extractor_weights_path": tmp_path / "weights.pth"}
    network = on_gpu(lambda: inception("inception-v3-compat", ["2048", "logits_unbiased"], **options))
    parts = map_images(Extractor("inception", network, GPU), pixels)
    features, logits = (torch.cat([part[name] for part in parts]) for name in ("features", "logits"))
    assert features.device == logits.device == GPU
    assert features.shape == (2, FEATURES_DIMS["inception"]) and logits.shape == (2, 1008)


# On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RUNS = {name: short_settings(name) for name in ("mar", "lazymar", "disa+recap+lateguidance", "lazymar+gtr", "fast")}
RUNS["random rows"] = short_settings("lazymar", selection="random")
every_run = pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)


def noise_for(model: MAR, seed: int, size: int, device: str = "cuda") -> ImageNoise:
    return ImageNoise(model, seed, range(size), 12, device)


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
    several, alone = (ImageNoise(random_model(), 0, indices, 10, "cuda").draw(3, 4) for indices in ([5, 7], [7]))
    torch.testing.assert_close(several[:, 1:], alone, rtol=0, atol=0)


@needs_gpu
def test_sinusoids_have_the_bits_of_the_cpu() -> None:
    timesteps = torch.arange(1000)
    assert torch.equal(timestep_sinusoids(timesteps.cuda()).cpu(), timestep_sinusoids(timesteps))
