"""Fashion-MNIST, read from the four IDX files that its authors publish (Xiao, Rasul and Vollgraf, 2017).

`torchvision.datasets.FashionMNIST` reads them only unpacked, from `FashionMNIST/raw/` below a folder, which is not how
Debian's package has them, and it meets a damaged file with an assertion that names nothing.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from util.errors import InputError

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
CLASS_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # split: (file prefix, number of images)


def load_fashion_mnist(
    folder: str | Path = FASHION_MNIST_FOLDER, split: str = "train"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one split of Fashion-MNIST.

    Args:
        folder: holds `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`.
        split:  "train" (60,000 images) or "test" (10,000 images).

    Returns:
        Images [N, 3, 32, 32] uint8, see `to_rgb32`, and labels [N] int64, 0 to 9 as in `CLASS_NAMES`.

    Raises:
        InputError: a file is missing, or is not the file of Fashion-MNIST that its name says.
    """
    prefix, count = SPLITS[split]
    folder = Path(folder)
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28))
    labels_path = folder / f"{prefix}-labels-idx1-ubyte.gz"
    labels = _read_idx(labels_path, (count,)).long()
    if labels.max() >= len(CLASS_NAMES):
        raise InputError(
            f"{labels_path} holds the label {labels.max()}, but Fashion-MNIST has 10 classes: get it again."
        )
    return to_rgb32(images), labels


def to_rgb32(images: torch.Tensor) -> torch.Tensor:
    """Add a black border of 2 pixels to grey images [N, 28, 28] uint8 and make them RGB: [N, 3, 32, 32] uint8."""
    return F.pad(images, (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1)


def _read_idx(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Read the uint8 array of a gzipped IDX file.

    The format: two zero bytes, the type of the elements (8: uint8), the number of dimensions, each dimension as a
    big-endian int32, then the elements.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: install Debian's package dataset-fashion-mnist, or name the folder that holds "
            "Fashion-MNIST's four .gz files with --fashion_mnist (torchvision.datasets.FashionMNIST('data', "
            "download=True) brings them to data/FashionMNIST/raw)."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a gzip file ({error}): get Fashion-MNIST again.") from None
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    if not content.startswith(header) or len(content) != len(header) + int(np.prod(shape)):
        raise InputError(f"{path} is not an IDX file of {' x '.join(map(str, shape))} bytes: get Fashion-MNIST again.")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=len(header)).copy()).view(shape)
