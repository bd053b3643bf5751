"""The KL-regularised autoencoder of latent diffusion: images to latents of a lower resolution, and back.

The defaults describe KL-16, whose latents MAR was trained on; parameter names are those of its published weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32


class AutoencoderKL(nn.Module):
    """A convolutional autoencoder with a diagonal Gaussian posterior over its latents.

    Args:
        embed_dim: channels z of the latents.
        ch: channels at the full resolution before `ch_mult`; a multiple of 32.
        ch_mult: the width of each resolution level as a multiple of `ch`; each level after the first halves the image.
        num_res_blocks: residual blocks per encoder level; a decoder level has one more.
        in_channels: channels of the images, in and out.

    Raises:
        ValueError: if `ch` is not a multiple of 32.
    """

    def __init__(
        self,
        embed_dim: int = 16,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        in_channels: int = 3,
    ):
        super().__init__()
        if ch <= 0 or ch % NORM_GROUPS:
            raise ValueError(f"ch must be a multiple of {NORM_GROUPS} for group normalisation, not {ch}")
        self.embed_dim = embed_dim
        self.stride_levels = len(ch_mult) - 1
        widths = [ch * mult for mult in ch_mult]
        self.encoder = Encoder(in_channels, ch, widths, num_res_blocks, 2 * embed_dim)
        self.decoder = Decoder(embed_dim, widths, num_res_blocks + 1, in_channels)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)

    @property
    def stride(self) -> int:
        """Pixels per latent position along each side."""
        return 2**self.stride_levels

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Return the posterior over the latents of images [B, in_channels, H, W] in about [-1, 1].

        Raises:
            ValueError: if H or W is not a multiple of `stride`.
        """
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"image sides must be multiples of {self.stride}, not {height} x {width}")
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Turn latents [B, embed_dim, h, w] into images [B, in_channels, h * stride, w * stride] in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def for_inference(vae: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """Convert a VAE in place: channels last, and to `dtype` where that is a half precision, otherwise to float32.

    Rounding in bfloat16 changes pixels by less than their own rounding does (`mar_tiny`: 0.2 of 255 on average).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return vae.eval().to(dtype if half else torch.float32).to(memory_format=torch.channels_last)


class DiagonalGaussian:
    """A Gaussian with independent entries; `parameters` [B, 2z, h, w] holds its mean, then its log variance."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents [B, z, h, w], differentiable in the parameters."""
        # The noise is float32 and comes from the generator's device, so a seed means the same draw at every precision.
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Return the divergence [B] from the standard normal, summed over each image's latents, in nats."""
        dtype = torch.promote_types(self.mean.dtype, torch.float32)  # a half-precision sum would lose most of its terms
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


class Encoder(nn.Module):
    """Images [B, C, H, W] to moments [B, out_channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, ch: int, widths: Sequence[int], num_blocks: int, out_channels: int):
        super().__init__()
        self.conv_in = conv3x3(in_channels, ch)
        last = len(widths) - 1
        self.down = nn.Sequential(
            *(
                DownLevel(before, width, num_blocks, lowest=level == last)
                for level, (before, width) in enumerate(zip([ch, *widths[:-1]], widths))
            )
        )
        self.mid = mid(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents [B, z, h, w] to images [B, out_channels, h * stride, w * stride]."""

    def __init__(self, z_channels: int, widths: Sequence[int], num_blocks: int, out_channels: int):
        super().__init__()
        self.conv_in = conv3x3(z_channels, widths[-1])
        self.mid = mid(widths[-1])
        # Indexed by resolution, `up.0` the highest, so data passes from the last level to the first.
        self.up = nn.ModuleList(
            named(
                block=residual_blocks(below, width, num_blocks),
                upsample=upsample(width) if level else nn.Identity(),
            )
            for level, (below, width) in enumerate(zip([*widths[1:], widths[-1]], widths))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], out_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class DownLevel(nn.Module):
    """Residual blocks at one resolution, followed by halving it; the lowest level attends after each block instead."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int, lowest: bool):
        super().__init__()
        self.block = residual_blocks(in_channels, channels, num_blocks)
        self.attn = nn.ModuleList(Attention(channels) if lowest else nn.Identity() for _ in self.block)
        self.downsample = nn.Identity() if lowest else downsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.downsample(x)


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a skip connection, projected where the width changes."""

    def __init__(self, in_channels: int, channels: int):
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

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, 1, H * W, C]
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


def mid(channels: int) -> nn.Sequential:
    """Return the blocks at the lowest resolution, between the levels and the latents."""
    return named(
        block_1=ResnetBlock(channels, channels), attn_1=Attention(channels), block_2=ResnetBlock(channels, channels)
    )


def residual_blocks(in_channels: int, channels: int, count: int) -> nn.Sequential:
    """Return `count` residual blocks, the first of which changes the width."""
    return nn.Sequential(*(ResnetBlock(channels if i else in_channels, channels) for i in range(count)))


def downsample(channels: int) -> nn.Sequential:
    """Halve the resolution, padding at the right and the bottom only."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def upsample(channels: int) -> nn.Sequential:
    """Double the resolution by repeating pixels, then smooth by a convolution."""
    return named(repeat=nn.Upsample(scale_factor=2.0, mode="nearest"), conv=conv3x3(channels, channels))


def conv3x3(in_channels: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, padding=1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def named(**modules: nn.Module) -> nn.Sequential:
    """Chain modules under the names that the published weights use."""
    return nn.Sequential(OrderedDict(modules))
