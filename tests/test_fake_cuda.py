"""Where every tensor of a GPU run would be: eval.py's path on tensors that have a device and a shape, but no values.

PyTorch's CUDA build knows without a GPU which operations mix devices, and which ask for a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch_fidelity
from tools import make_sampler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from models import (
    MAR,
    PRESETS,
    AnnealedSteps,
    AutoencoderKL,
    CachePolicy,
    DetailedTokens,
    cast_model,
    create_model,
)
from util import weights
from util.extractors import FEATURES_DIMS, Extractor
from util.images import decode, map_images, to_uint8

GPU = torch.device("cuda", 0)
BATCH, STEPS = 128, 8


def follows_devices() -> bool:
    """Whether this build of PyTorch can: one without CUDA cannot, and 2.8 asks a GPU even to slice a tensor."""
    with FakeTensorMode():
        try:
            x = torch.empty(1, 1, 3, 3, device=GPU)
            nn.functional.conv2d(x[:, :1], x)
        except (RuntimeError, AssertionError):
            return False
    return True


pytestmark = pytest.mark.skipif(not follows_devices(), reason="this build of PyTorch asks a GPU where tensors would be")


@pytest.fixture
def no_values() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def files_without_values(no_values, monkeypatch) -> None:
    """Weights files are read for their names, shapes and dtypes."""
    read = weights._read

    def read_shapes(path) -> tuple[dict[str, Tensor], dict[str, str]]:
        with unset_fake_temporarily():
            contents, metadata = read(path)
        return {name: no_values.from_tensor(value) for name, value in contents.items()}, metadata

    monkeypatch.setattr(weights, "_read", read_shapes)
    monkeypatch.setattr(weights, "_check_fit", lambda *_: None)  # it looks at values


class NoiseWithoutValues:
    """A generator would need a GPU. Orders come from the host, as those of `ImageNoise` do."""

    def __init__(self, model: MAR, denoising_steps: int) -> None:
        self.orders = torch.empty(BATCH, model.seq_len, dtype=torch.long)
        self.token_dim, self.denoising_steps = model.token_dim, denoising_steps

    def draw(self, step: int, num_tokens: int) -> Tensor:
        return torch.empty(self.denoising_steps + 1, BATCH, num_tokens, self.token_dim, device=GPU)


def on_gpu(make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """What `make` returns, with tensors without values in place of its own."""
    with unset_fake_temporarily(), torch.device("meta"):
        network = make().eval()
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=GPU)
                    tensors[name] = nn.Parameter(empty, requires_grad=False) if tensors is module._parameters else empty
    return network


# As few steps as have each of their kinds: refreshes, lazy ones with all rows and with some; of denoising steps full
# ones, warm-up and reuse.
RUNS = {
    "mar": (2, {}),
    "lazymar": (21, {"cache": CachePolicy(start_step=1, refresh_interval=4)}),
    "lazymar+gtr": (
        5,
        {
            "num_iter": (8, 2, 2),
            "num_sampling_steps": AnnealedSteps(3, 2, "generation"),
            "detailed_tokens": DetailedTokens(0.1, 5),
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_whole_loop_of_mar_huge(no_values, name: str) -> None:
    denoising_steps, settings = RUNS[name]
    settings = {"num_iter": STEPS, "num_sampling_steps": denoising_steps, **settings}
    model = cast_model(on_gpu(lambda: create_model("mar_huge")), torch.bfloat16)
    with GPU:
        latents, labels = torch.empty(BATCH, 16, 16, 16), torch.empty(BATCH, dtype=torch.long)
    noise = NoiseWithoutValues(model, denoising_steps)
    sampler = make_sampler(model, name, **settings)
    sampler.make_capture = None
    with torch.inference_mode():  # `steps` asks whether the labels are in range, which takes their values
        for sampled in sampler._steps(labels, noise, latents):
            assert sampled.conditions.device == sampled.tokens.device == GPU
            assert sampled.conditions.dtype == torch.bfloat16 and sampled.tokens.dtype == torch.float32
    assert sampled.step.index == len(sampler.plan) - 1


def test_decoding(no_values) -> None:
    vae, latents = on_gpu(AutoencoderKL, torch.bfloat16), torch.empty(BATCH, 16, 16, 16, device=GPU)
    images = decode(vae, latents / PRESETS["mar_huge"].latent_scale)
    assert (images.shape, images.dtype, images.device) == ((BATCH, 3, 256, 256), torch.float32, GPU)
    pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu()
    assert (pixels.shape, pixels.dtype, pixels.device.type) == ((BATCH, 256, 256, 3), torch.uint8, "cpu")


def test_inceptions_features(no_values, tmp_path, monkeypatch) -> None:
    torch_fidelity_network = torch_fidelity.FeatureExtractorInceptionV3
    monkeypatch.setattr(torch_fidelity_network, "load_state_dict", lambda *_: None)
    monkeypatch.setattr("torch.load", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "to", lambda network, *_, **__: network)  # it cannot move what has no values
    (tmp_path / "weights.pth").touch()
    options = {"feature_extractor_weights_path": tmp_path / "weights.pth"}
    layers = ["2048", "logits_unbiased"]
    network = on_gpu(lambda: torch_fidelity_network("inception-v3-compat", layers, **options))
    extractor = Extractor("inception", network, GPU)
    pixels = torch.empty(BATCH, 3, 256, 256, dtype=torch.uint8)  # those of the PNGs, on the host
    parts = map_images(extractor, pixels.to(GPU))
    features, logits = (torch.cat([part[name] for part in parts]) for name in ("features", "logits"))
    assert features.device == logits.device == GPU
    assert features.cpu().shape == (BATCH, FEATURES_DIMS["inception"]) and logits.cpu().shape == (BATCH, 1008)


def test_the_loaded_models_are_on_the_gpu(files_without_values, monkeypatch) -> None:
    monkeypatch.setattr(weights, "for_inference", lambda vae, dtype: vae)  # `Module.to` cannot convert such tensors
    model, vae = weights.load_model("mar_tiny", GPU, torch.bfloat16)
    assert {parameter.device for network in (model, vae) for parameter in network.parameters()} == {GPU}
    assert model.encoder_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert model.diffloss.net.input_proj.weight.dtype == torch.float32
