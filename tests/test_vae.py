from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models.vae import AutoencoderKL, DiagonalGaussian

SMALL = {"embed_dim": 4, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1}


def made_up(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on the name alone."""
    seed = zlib.crc32(f"vae/{name}".encode())
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))


def made_up_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    r = made_up(name, shape)
    if len(shape) == 4:
        return r / r[0].numel() ** 0.5
    return 0.1 * r if name.endswith("bias") else 1 + 0.1 * r


@pytest.fixture
def small() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL)


@torch.inference_mode()
def test_names_and_numbers_are_those_of_the_published_weights_and_the_reference():
    reference = dict(np.load(Path(__file__).parent / "data" / "vae.npz", allow_pickle=False))
    kl16 = AutoencoderKL().eval()
    kl16.load_state_dict({name: made_up_weight(name, tuple(value.shape)) for name, value in kl16.state_dict().items()})
    assert sorted(kl16.state_dict()) == sorted(reference["names"].tolist())
    image = kl16.decode(made_up("z", (1, kl16.embed_dim, 16, 16)))
    torch.testing.assert_close(image, torch.from_numpy(reference["image"]), rtol=0, atol=1e-4)
    posterior = kl16.encode(0.5 * made_up("x", (1, 3, 16 * kl16.stride, 256)))
    moments = torch.from_numpy(reference["moments"])
    torch.testing.assert_close(posterior.parameters, moments, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.mean, moments[:, :16], rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precision_and_channels_last_stay_close_to_float64(small, dtype, limit, memory_format):
    x = 0.5 * made_up("small", (2, 3, 32, 32)).double()
    exact = small.double()
    moments = exact.encode(x).parameters
    image = exact.decode(exact.encode(x).mean)
    vae = small.to(dtype=dtype, memory_format=memory_format)
    posterior = vae.encode(x.to(dtype=dtype, memory_format=memory_format))
    decoded = vae.decode(posterior.mean)
    assert decoded.dtype == posterior.sample(torch.Generator()).dtype == dtype
    for value, expected in ((posterior.parameters, moments), (decoded, image)):
        assert value.shape == expected.shape and (value.double() - expected).norm() / expected.norm() < limit


def test_kl_agrees_with_torch_distributions():
    posterior = DiagonalGaussian(made_up("kl", (3, 8, 16, 16)))
    mean, logvar = posterior.parameters.double().chunk(2, dim=1)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl().double(), exact.sum(dim=(1, 2, 3)), rtol=1e-5, atol=0)


def test_image_sizes_that_do_not_divide_are_refused(small):
    with pytest.raises(ValueError, match="multiples of 2, not 32 x 31"):
        small.encode(torch.zeros(1, 3, 32, 31))
