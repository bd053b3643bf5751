"""Images to train on: Fashion-MNIST, or a folder with a subfolder for each class."""

import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from util.errors import InputError


def load_images(data: str, size: int, fashion_mnist: Path) -> tuple[Tensor, Tensor]:
    """Load images [N, 3, size, size] uint8 and their classes [N].

    `data` is "fashion-mnist", whose files are in the folder `fashion_mnist`, or a folder with a subfolder for each
    class; its images are cropped to squares and resized. Raises InputError for no images or one that is unreadable.
    """
    if data == "fashion-mnist":
        if size != 32:
            raise InputError(f"--data fashion-mnist has 32 x 32 images, but the model's are {size} x {size}")
        return _load_fashion_mnist(fashion_mnist)
    files = sorted(Path(data).glob("[!.]*/[!.]*"))
    if not files:
        raise InputError(f"--data {data}: no such folder, or no subfolders with images (one for each class) in it")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for image, path in zip(images, tqdm(files, desc=f"reading {data}"), strict=True):
        try:
            with Image.open(path) as opened:
                square = ImageOps.fit(opened.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        except Exception as error:  # a damaged file can fail anywhere in the reader
            raise InputError(f"{path} cannot be read as an image ({error}): remove it from --data") from None
        image[:] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    _, labels = np.unique([path.parent.name for path in files], return_inverse=True)
    return images, torch.from_numpy(labels)


def _load_fashion_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Load the training images of Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), with a black border of 2 pixels."""
    files = [folder / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    try:
        pixels, classes = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
        images = torch.frombuffer(pixels, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
        labels = torch.frombuffer(classes, dtype=torch.uint8, offset=8).long()
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise InputError(
            f"Fashion-MNIST cannot be read from {folder} ({error}): install Debian's package dataset-fashion-mnist, or "
            "give the folder of Fashion-MNIST's .gz files with --fashion_mnist"
        ) from None
    return F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), labels
