"""The KL-regularized autoencoder of latent diffusion.

The defaults are those of KL-16, whose latents MAR was trained on. Parameters are named as in its published weights.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
group_norm = partial(nn.GroupNorm, 32, eps=1e-6)


class AutoencoderKL(nn.Module):
    """A convolutional autoencoder with a diagonal Gaussian posterior over its latents.

    Args:
        embed_dim:      latent channels z.
        ch:             channels at the full resolution before `ch_mult`, a multiple of 32.
        ch_mult:        width of each level as a multiple of `ch`; each level after the first halves the resolution.
        num_res_blocks: residual blocks per encoder level; a decoder level has one more.
    """

    def __init__(
        self, embed_dim: int = 16, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2
    ) -> None:
        super().__init__()
        widths = [ch * mult for mult in ch_mult]
        self.encoder = encoder([ch, *widths], num_res_blocks, 2 * embed_dim)
        self.decoder = decoder([*widths, widths[-1]], num_res_blocks + 1, embed_dim)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [B, embed_dim, h, w] of the latents of images [B, 3, H, W].

        Images are in about [-1, 1]. Their sides must be multiples of the stride, 2 ** (levels - 1).
        """
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def encode(self, x: Tensor) -> Tensor:
        """Return the posterior's mean."""
        return self.posterior(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Return images [B, 3, h * stride, w * stride] in about [-1, 1] of latents [B, embed_dim, h, w]."""
        return self.decoder(self.post_quant_conv(z))


def deep_compression_autoencoder() -> nn.Module:
    """Return DC-AE f32c32 as trained on ImageNet (arXiv 2410.10733), with the parameter names of diffusers.

    `decode` returns images [B, 3, 32 h, 32 w] in about [-1, 1] of latents [B, 32, h, w], and `encode` the reverse.
    The fields are those of `mit-han-lab/dc-ae-f32c32-in-1.0-diffusers`.

    Raises ValueError if the package diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderDC
    except ImportError:
        raise ValueError(
            "model of 512 pixels needs the package diffusers: install it with `pip install diffusers`, or take a model "
            "of 256 pixels"
        ) from None
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
    vae.encode, vae.decode = lambda x: encode(x).latent, lambda z: decode(z).sample
    return vae


def for_inference(vae: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """Convert a VAE in place: channels last, and to `dtype` if that is a half precision, otherwise to float32.

    Rounding in bfloat16 changes pixels by less than their own rounding does (`mar_tiny`: 0.2 of 255 on average).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return vae.eval().to(dtype if half else torch.float32).to(memory_format=torch.channels_last)


def encoder(widths: Sequence[int], num_blocks: int, out_channels: int) -> nn.Sequential:
    """Return layers from images to moments; `widths` are the channels before the first level and of each level."""
    levels = [DownLevel(before, width, num_blocks) for before, width in itertools.pairwise(widths[:-1])]
    return named(
        conv_in=conv3x3(3, widths[0]),
        down=nn.Sequential(*levels, DownLevel(widths[-2], widths[-1], num_blocks, is_last=True)),
        mid=mid(widths[-1]),
        norm_out=group_norm(widths[-1]),
        silu=nn.SiLU(),
        conv_out=conv3x3(widths[-1], out_channels),
    )


def decoder(widths: Sequence[int], num_blocks: int, z_channels: int) -> nn.Sequential:
    """Return layers from latents to images; `widths` are the channels of each level and below the last."""
    levels = {}
    for i, (width, below) in enumerate(itertools.pairwise(widths)):
        upsample = named(repeat=nn.Upsample(scale_factor=2.0), conv=conv3x3(width, width)) if i else nn.Identity()
        levels[str(i)] = named(block=residual_blocks(below, width, num_blocks), upsample=upsample)
    return named(
        conv_in=conv3x3(z_channels, widths[-1]),
        mid=mid(widths[-1]),
        up=named(**dict(reversed(levels.items()))),  # from the last level to the first
        norm_out=group_norm(widths[0]),
        silu=nn.SiLU(),
        conv_out=conv3x3(widths[0], 3),
    )


class DownLevel(nn.Module):
    """Residual blocks, then half the resolution; the last level attends after each block and keeps its resolution."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, is_last: bool = False) -> None:
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


def named(**modules: nn.Module) -> nn.Sequential:
    """Chain modules under the names that the published weights use."""
    return nn.Sequential(OrderedDict(modules))
