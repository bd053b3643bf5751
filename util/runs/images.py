"""Pixels: from latents to uint8, PNG bytes, and a sheet of many images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from models import AutoencoderKL
from util.job.threads import map_images


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] float32, in about [-1, 1], of the VAE's latents [B, C, h, w], in parts that fit."""
    dtype = vae.post_quant_conv.weight.dtype

    @torch.inference_mode()  # the mode does not extend to other threads by itself
    def decode_part(part: torch.Tensor) -> torch.Tensor:
        return vae.decode(part.to(dtype, memory_format=torch.channels_last)).float()

    return torch.cat(map_images(decode_part, latents))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images of about [-1, 1] as pixels 0 to 255, rounded to the nearest; the shape stays."""
    return ((images + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of an image, uint8 [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def contact_sheet(images: Sequence[np.ndarray], columns: int = 8, gap: int = 2, min_size: int = 64) -> np.ndarray:
    """Images, uint8 [H, W, 3] each, side by side on white in rows of `columns`; small ones are enlarged."""
    height, width = images[0].shape[:2]
    scale = max(1, min_size // height)
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    cell_height, cell_width = scale * height + gap, scale * width + gap
    sheet = np.full((rows * cell_height + gap, columns * cell_width + gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * cell_height + gap, number % columns * cell_width + gap
        enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet[top : top + scale * height, left : left + scale * width] = enlarged
    return sheet
