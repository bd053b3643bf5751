"""Where every tensor of a GPU run would be: eval.py's path on tensors that have a device and a shape, but no values.

PyTorch's CUDA build knows without a GPU which operations mix devices, and which ask for a value on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch_fidelity
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import eval as program
from models import MAR, AutoencoderKL, CachePolicy, Sampler, cast_model, create_model
from util import checkpoint
from util.images import decode, to_uint8
from util.options import check, parse_options
from util.scoring import Extractor
from util.threads import map_images

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this build of PyTorch knows no CUDA")
GPU = torch.device("cuda", 0)
BATCH, STEPS = 128, 64


@pytest.fixture
def no_values() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def files_without_values(no_values, monkeypatch) -> None:
    """Weights files are read for their names, shapes and dtypes."""
    read = checkpoint._read

    def read_shapes(path) -> dict[str, Tensor]:
        with unset_fake_temporarily():
            content = read(path)
        return {name: no_values.from_tensor(value) for name, value in content.items()}

    monkeypatch.setattr(checkpoint, "_read", read_shapes)


class NoiseWithoutValues:
    """A generator would need a GPU. Orders come from the host, as those of `ImageNoise` do."""

    def __init__(self, model: MAR, denoising_steps: int) -> None:
        self.orders = torch.empty(BATCH, model.seq_len, dtype=torch.long)
        self.token_dim, self.denoising_steps = model.token_dim, denoising_steps

    def draw(self, step: int, num_tokens: int) -> Tensor:
        return torch.empty(self.denoising_steps + 1, BATCH, num_tokens, self.token_dim, device=GPU)


# As few denoising steps as have each of their kinds: full; warm-up and reuse.
@pytest.mark.parametrize(("policy", "denoising_steps"), [(None, 2), (CachePolicy(), 21)], ids=["baseline", "lazy"])
def test_the_whole_loop_of_mar_huge(no_values, policy: CachePolicy | None, denoising_steps: int) -> None:
    with GPU:
        model = cast_model(create_model("mar_huge"), torch.bfloat16)
        latents = torch.empty(BATCH, 16, 16, 16)
        labels = torch.empty(BATCH, dtype=torch.long)
    noise = NoiseWithoutValues(model, denoising_steps)
    sampler = Sampler(model, num_iter=STEPS, num_sampling_steps=denoising_steps, cache=policy, cuda_graphs=False)
    with torch.inference_mode():  # `steps` asks whether the labels are in range, which takes their values
        for sampled in sampler._steps(labels, noise, latents):
            assert sampled.conditions.device == sampled.tokens.device == GPU
            assert sampled.conditions.dtype == torch.bfloat16 and sampled.tokens.dtype == torch.float32
    assert sampled.step.index == STEPS - 1


def half_precision(network: nn.Module) -> None:
    """`Module.to` cannot convert tensors without values."""
    for parameter in network.parameters():
        memory_format = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        parameter.data = parameter.data.to(torch.bfloat16, memory_format=memory_format)


def test_decoding(no_values) -> None:
    with GPU:
        vae, latents = AutoencoderKL().eval(), torch.empty(BATCH, 16, 16, 16)
    half_precision(vae)
    images = decode(vae, latents / MAR.latent_scale)
    assert (images.shape, images.dtype, images.device) == ((BATCH, 3, 256, 256), torch.float32, GPU)
    pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu()
    assert (pixels.shape, pixels.dtype, pixels.device.type) == ((BATCH, 256, 256, 3), torch.uint8, "cpu")


def inception_without_values(mode: FakeTensorMode, file: Path) -> nn.Module:
    """torch-fidelity's network on the GPU."""
    torch.save({}, file)
    network_class = torch_fidelity.FeatureExtractorInceptionV3
    with unset_fake_temporarily(), mock.patch.object(network_class, "load_state_dict"):
        network = network_class("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
        network.requires_grad_(False)
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else mode.from_tensor(tensor).to(GPU)
    return network


def test_inceptions_features(no_values, tmp_path) -> None:
    with mock.patch.object(nn.Module, "to", lambda network, _: network):  # it is there already
        extractor = Extractor("inception", inception_without_values(no_values, tmp_path / "weights.pth"), GPU)
    pixels = torch.empty(BATCH, 3, 256, 256, dtype=torch.uint8)  # those of the PNGs, on the host
    features, logits = map(torch.cat, zip(*map_images(extractor, pixels.to(GPU))))
    assert features.device == logits.device == GPU
    assert features.cpu().shape == (BATCH, extractor.features_dim) and logits.cpu().shape == (BATCH, 1008)


def test_the_loaded_models_are_on_the_gpu(files_without_values, monkeypatch) -> None:
    monkeypatch.setattr(program, "for_inference", lambda vae, dtype: vae)  # see `half_precision`
    options = check(parse_options("", ["--model", "mar_tiny", "--lazy_mar"]))
    model, vae, _ = program.load_models(options, GPU, torch.bfloat16)
    assert {parameter.device for network in (model, vae) for parameter in network.parameters()} == {GPU}
    assert model.encoder_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert model.diffloss.net.input_proj.weight.dtype == torch.float32
