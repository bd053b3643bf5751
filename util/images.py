"""Images: from latents to pixels, from pixels to PNG files, and a grid of many images in one."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models import AutoencoderKL

T = TypeVar("T")

IMAGES_AT_ONCE = 16  # in a convolutional network on a GPU, which bounds its activations


def map_images(network: Callable[[Tensor], T], images: Tensor) -> list[T]:
    """Apply a convolutional network to a batch [B, ...] in parts; return its results in order.

    On a CPU a part is one image, computed by one thread. A convolution rounds differently when several threads share
    it, and for several images at a time; an image must depend neither on the number of processes on a machine nor on
    the other images of its batch.
    """
    if images.device.type != "cpu":
        return [network(part) for part in images.split(IMAGES_AT_ONCE)]
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(network, images.split(1)))
    finally:
        torch.set_num_threads(num_threads)  # part of the setting is shared by all threads


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode the VAE's latents [B, C, h, w] to images [B, 3, H, W] float32, in about [-1, 1].

    A sampler's latents are at unit variance: divide them by the preset's `latent_scale` first.
    """
    return _apply(vae, vae.decode, latents)


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images [B, 3, H, W] of about [-1, 1] as the VAE's latents [B, C, h, w] float32, the posterior's mean.

    A model's latents are at unit variance: these times the preset's `latent_scale`.
    """
    return _apply(vae, vae.encode, images)


def _apply(vae: AutoencoderKL, network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    dtype = next(vae.parameters()).dtype

    @torch.inference_mode()  # the mode does not extend to other threads by itself
    def apply(part: Tensor) -> Tensor:
        return network(part.to(dtype, memory_format=torch.channels_last)).float()

    return torch.cat(map_images(apply, batch))


def to_pixels(images: Tensor) -> np.ndarray:
    """Round images [B, 3, H, W] of about [-1, 1], on any device, to pixels [B, H, W, 3] uint8, as in a PNG."""
    rounded = ((images + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode one image [H, W, 3] uint8 as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def image_grid(images: Sequence[np.ndarray], columns: int = 8, gap: int = 2, min_size: int = 64) -> np.ndarray:
    """Lay out images [H, W, 3] uint8 in rows of `columns`, on white; images below `min_size` pixels are enlarged."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    scale = max(1, min_size // len(images[0]))
    cells = np.stack(images).repeat(scale, axis=1).repeat(scale, axis=2)
    cells = np.pad(cells, ((0, rows * columns - len(cells)), (0, gap), (0, gap), (0, 0)), constant_values=255)
    _, height, width, _ = cells.shape
    grid = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return np.pad(grid, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
