"""Images to train on: Fashion-MNIST, or a folder with a subfolder for each class."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from util.errors import InputError

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


def load_images(data: str, size: int, fashion_mnist: Path = FASHION_MNIST_FOLDER) -> tuple[Tensor, Tensor]:
    """Load images [N, 3, size, size] uint8 and their classes [N].

    `data` is "fashion-mnist", whose files are in the folder `fashion_mnist`, or a folder with a subfolder for each
    class; its images are cropped to squares and resized. Raises InputError for no images or one that is unreadable.
    """
    if data == "fashion-mnist":
        if size != 32:
            raise InputError(f"--data fashion-mnist has 32 x 32 images, but the model's are {size} x {size}")
        return load_fashion_mnist(fashion_mnist)
    folders = sorted(path for path in Path(data).glob("[!.]*") if path.is_dir())
    files = [(label, path) for label, folder in enumerate(folders) for path in sorted(folder.glob("[!.]*"))]
    if not files:
        raise InputError(f"--data {data}: no such folder, or no subfolders with images (one for each class) in it")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for image, (_, path) in zip(images, tqdm(files, desc=f"reading {data}"), strict=True):
        try:
            with Image.open(path) as opened:
                square = ImageOps.fit(opened.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        except Exception as error:  # a damaged file can fail anywhere in the reader
            raise InputError(f"{path} cannot be read as an image ({error}): remove it from --data") from None
        image[:] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return images, torch.tensor([label for label, _ in files])


def load_fashion_mnist(folder: Path = FASHION_MNIST_FOLDER, split: str = "train") -> tuple[Tensor, Tensor]:
    """Load a split of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), "train" or "t10k", the test images.

    Returns images [N, 3, 32, 32] uint8, with a black border of 2 pixels, and their classes [N], 0 to 9. Raises
    InputError if a file is missing or damaged.
    """
    images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()
    return F.pad(images, (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1), labels


def _read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of uint8: 3 bytes, the number of dimensions, each dimension as int32, the data."""
    try:
        content = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape).copy())
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise InputError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): install Debian's package "
            "dataset-fashion-mnist, or give the folder of Fashion-MNIST's four .gz files with --fashion_mnist"
        ) from None
