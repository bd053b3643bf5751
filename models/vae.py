"""The KL-regularized autoencoder of latent diffusion.

The defaults are those of KL-16, whose latents MAR was trained on. Parameters are named as in its published weights.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AutoencoderKL(nn.Module):
    """A convolutional autoencoder with a diagonal Gaussian posterior over its latents.

    Args:
        embed_dim:      latent channels z.
        ch:             channels at the full resolution before `ch_mult`, a multiple of 32.
        ch_mult:        width of each level as a multiple of `ch`; each level after the first halves the resolution.
        num_res_blocks: residual blocks per encoder level; a decoder level has one more.
        in_channels:    channels of the images.
    """

    def __init__(
        self,
        embed_dim: int = 16,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.stride = 2 ** (len(ch_mult) - 1)  # pixels per latent along each side
        widths = [ch * mult for mult in ch_mult]
        self.encoder = encoder(in_channels, [ch, *widths], num_res_blocks, 2 * embed_dim)
        self.decoder = decoder(embed_dim, [*widths, widths[-1]], num_res_blocks + 1, in_channels)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Return the posterior over the latents of images [B, in_channels, H, W] in about [-1, 1].

        Raises ValueError if H or W is not a multiple of `stride`.
        """
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            raise ValueError(f"image sides must be multiples of {self.stride}, not {x.shape[-2]} x {x.shape[-1]}")
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Return images [B, in_channels, h * stride, w * stride] in about [-1, 1] of latents [B, embed_dim, h, w]."""
        return self.decoder(self.post_quant_conv(z))


def deep_compression_autoencoder() -> nn.Module:
    """Return DC-AE f32c32 as trained on ImageNet (arXiv 2410.10733), with the parameter names of diffusers.

    `decode` returns images [B, 3, 32 h, 32 w] in about [-1, 1] of latents [B, 32, h, w]. It is no variational
    autoencoder: `encode` returns an object whose `mean` is the latents of images.
    The fields are those of `mit-han-lab/dc-ae-f32c32-in-1.0-diffusers`.

    Raises ValueError if the package diffusers is not installed.
    """
    check_diffusers()
    from diffusers import AutoencoderDC

    block_types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    vae: Any = AutoencoderDC(
        latent_channels=32,
        encoder_block_types=block_types,
        decoder_block_types=block_types,
        encoder_layers_per_block=(0, 4, 8, 2, 2, 2),
        decoder_layers_per_block=(0, 5, 10, 2, 2, 2),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * 3,
        decoder_act_fns=("relu",) * 3 + ("silu",) * 3,
    )
    encode, decode = vae.encode, vae.decode
    vae.encode = lambda x: SimpleNamespace(mean=encode(x, return_dict=False)[0])
    vae.embed_dim, vae.decode = 32, lambda z: decode(z, return_dict=False)[0]
    return vae


def check_diffusers() -> None:
    """Raise ValueError if the package diffusers, which models of 512 pixels need, is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError(
            "model of 512 pixels needs the package diffusers: install it with `pip install diffusers`, or take a model "
            "of 256 pixels"
        )


def for_inference(vae: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """Convert a VAE in place: channels last, and to `dtype` if that is a half precision, otherwise to float32.

    Rounding in bfloat16 changes pixels by less than their own rounding does (`mar_tiny`: 0.2 of 255 on average).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return vae.eval().to(dtype if half else torch.float32).to(memory_format=torch.channels_last)


class DiagonalGaussian:
    """A Gaussian with independent entries; `parameters` [B, 2z, h, w] holds its mean, then its log variance."""

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw latents [B, z, h, w] on the generator's device, differentiable in the parameters."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Return the divergence [B] from the standard normal, summed over each image's latents, in nats."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def encoder(in_channels: int, widths: Sequence[int], num_blocks: int, out_channels: int) -> nn.Sequential:
    """Return layers from images to moments; `widths` are the channels before the first level and of each level."""
    last = len(widths) - 1
    return named(
        conv_in=conv3x3(in_channels, widths[0]),
        down=nn.Sequential(*(DownLevel(widths[i - 1], widths[i], num_blocks, i == last) for i in range(1, last + 1))),
        mid=mid(widths[-1]),
        norm_out=group_norm(widths[-1]),
        silu=nn.SiLU(),
        conv_out=conv3x3(widths[-1], out_channels),
    )


def decoder(z_channels: int, widths: Sequence[int], num_blocks: int, out_channels: int) -> nn.Sequential:
    """Return layers from latents to images; `widths` are the channels of each level and below the last."""
    conv_in, middle, levels = conv3x3(z_channels, widths[-1]), mid(widths[-1]), {}
    for i in range(len(widths) - 1):
        level = named(block=residual_blocks(widths[i + 1], widths[i], num_blocks), upsample=nn.Identity())
        if i > 0:
            repeat = nn.Upsample(scale_factor=2.0, mode="nearest")
            level.upsample = named(repeat=repeat, conv=conv3x3(widths[i], widths[i]))
        levels[str(i)] = level
    return named(
        conv_in=conv_in,
        mid=middle,
        up=named(**dict(reversed(levels.items()))),  # from the last level to the first
        norm_out=group_norm(widths[0]),
        silu=nn.SiLU(),
        conv_out=conv3x3(widths[0], out_channels),
    )


class DownLevel(nn.Module):
    """Residual blocks, then half the resolution; the last level attends after each block and keeps its resolution."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, is_last: bool) -> None:
        super().__init__()
        self.block = residual_blocks(in_channels, channels, num_blocks)
        self.attn = nn.ModuleList(Attention(channels) if is_last else nn.Identity() for _ in self.block)
        self.downsample: nn.Module = nn.Identity()
        if not is_last:  # padded at the right and the bottom only
            self.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.downsample(x)


class ResnetBlock(nn.Module):
    """Two normalized convolutions with a skip connection, which is projected where the width changes."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, channels)
        self.norm2 = group_norm(channels)
        self.conv2 = conv3x3(channels, channels)
        self.nin_shortcut = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H * W, C]
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


def mid(channels: int) -> nn.Sequential:
    """Return the blocks at the lowest resolution."""
    return named(
        block_1=ResnetBlock(channels, channels), attn_1=Attention(channels), block_2=ResnetBlock(channels, channels)
    )


def residual_blocks(in_channels: int, channels: int, count: int) -> nn.Sequential:
    """Return `count` residual blocks, the first of which changes the width."""
    return nn.Sequential(*(ResnetBlock(channels if i else in_channels, channels) for i in range(count)))


def conv3x3(in_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, padding=1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def named(**modules: nn.Module) -> nn.Sequential:
    """Chain modules under the names that the published weights use."""
    return nn.Sequential(OrderedDict(modules))
