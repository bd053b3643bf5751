import zlib
from pathlib import Path

import numpy as np
import torch

from models.vae import AutoencoderKL, for_inference


def made_up(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on the name alone."""
    seed = zlib.crc32(f"vae/{name}".encode())
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype("float32"))


def made_up_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    r = made_up(name, shape)
    if len(shape) == 4:
        return r / r[0].numel() ** 0.5
    return 0.1 * r if name.endswith("bias") else 1 + 0.1 * r


@torch.inference_mode()
def test_names_and_numbers_are_those_of_the_published_weights_and_the_reference():
    reference = dict(np.load(Path(__file__).parent / "data" / "vae.npz", allow_pickle=False))
    kl16 = AutoencoderKL().eval()
    kl16.load_state_dict({name: made_up_weight(name, tuple(value.shape)) for name, value in kl16.state_dict().items()})
    assert sorted(kl16.state_dict()) == sorted(reference["names"].tolist())
    image = kl16.decode(made_up("z", (1, 16, 16, 16)))
    torch.testing.assert_close(image, torch.from_numpy(reference["image"]), rtol=0, atol=1e-4)
    mean, std = kl16.posterior(0.5 * made_up("x", (1, 3, 256, 256)))
    moments = torch.cat([mean, 2 * std.log()], dim=1)
    torch.testing.assert_close(moments, torch.from_numpy(reference["moments"]), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_lower_precision_stays_close_to_float64():
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=4, ch=32, ch_mult=(1, 2), num_res_blocks=1).double()
    x = 0.5 * made_up("small", (2, 3, 32, 32)).double()
    mean = vae.encode(x)
    image = vae.decode(mean)
    for dtype, limit in [(torch.float32, 1e-5), (torch.bfloat16, 0.05)]:
        vae = for_inference(vae, dtype)
        for value, expected in [(vae.encode(x.to(dtype)), mean), (vae.decode(mean.to(dtype)), image)]:
            assert value.dtype == dtype and value.shape == expected.shape
            assert (value.double() - expected).norm() / expected.norm() < limit
