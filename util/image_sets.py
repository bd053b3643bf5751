"""Sets of images on disk: a folder, the folder of a run, or an `.npz` file as ADM's evaluator takes it (`arr_0`)."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.errors import InputError, why_unreadable
from util.folder import open_finished

ENDINGS = (".png", ".jpg", ".jpeg")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # of Pillow: 8-bit RGB can hold their opaque pixels


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, in the order of their names."""

    path: Path  # their folder or file
    images: Sequence[Any]  # files, or pixels [H, W, 3] uint8
    has_statistics: bool = False  # the file also holds mu and sigma, as ADM's reference files do

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        return f"{len(self):,} images of {self.path}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image, [H, W, 3]."""
        return _pixels(self.images[0]).shape

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Read images in batches [B, 3, H, W] uint8.

        Raises InputError if one cannot be read as 8-bit RGB without loss or has another size than the first.
        """
        shape = self.shape
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self), batch_size):
                images = self.images[start : start + batch_size]
                pixels = list(pool.map(_pixels, images))
                for image, each in zip(images, pixels):
                    if each.shape != shape:
                        raise InputError(f"{image} is {each.shape}, but the first image {shape}: make them one size")
                yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def open_images(path: Path) -> ImageSet | None:
    """Look at a set of images; return None for a file that holds none.

    A folder's images may be in subfolders, such as one for each class. Files that are no images are named in a note.

    Raises InputError if there are no images.
    """
    if path.is_dir():
        return _open_folder(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                return None
            images, has_statistics = file["arr_0"], "mu" in file and "sigma" in file
    except Exception as error:  # a damaged archive fails in zipfile, zlib or NumPy's header parser
        raise InputError(f"{path} is no folder, and no .npz file that can be read ({why_unreadable(error)})") from None
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        raise InputError(f"{path} holds arr_0 of {images.dtype} {list(images.shape)}, not uint8 [N, H, W, 3]")
    return ImageSet(path, images, has_statistics)


def _open_folder(path: Path) -> ImageSet:
    def refuse(error: OSError) -> NoReturn:
        raise error

    is_run = (path / "run.json").exists()
    walk = os.walk(path / "images" if is_run else path, onerror=refuse, followlinks=True)
    folders = {os.path.realpath(folder): (folder, names) for folder, _, names in walk}  # once each: links can loop
    found = sorted(Path(folder, name) for folder, names in folders.values() for name in names)
    files = [file for file in found if file.suffix.lower() in ENDINGS]
    if not files:
        raise InputError(f"{path} holds no PNG or JPEG images: name a folder that does")
    if others := [str(file) for file in found if file.suffix.lower() not in ENDINGS]:
        print(f"note: left out what is no PNG or JPEG image, {len(others)} in all, such as {', '.join(others[:3])}")
    if is_run and len(files) != open_finished(path)[0]["num_images"]:
        raise InputError(f"{path} lacks images, and holds {len(files)}: finish the run, without --no-save_images")
    return ImageSet(path, files)


def _pixels(image: Path | np.ndarray) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 of a file, or those given."""
    if isinstance(image, np.ndarray):
        return image
    try:
        with Image.open(image, formats=("PNG", "JPEG")) as file:  # others may start programs, such as EPS
            is_8_bit = file.mode in MODES and ";16" not in str(file.tile)  # Pillow converts 16 bits to 8
            if is_8_bit and file.convert("RGBA").getchannel("A").getextrema() == (255, 255):
                return np.array(file.convert("RGB"))
            reason = f"its mode is {file.mode}, and it may have 16 bits or transparent pixels"
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib.error and more
        reason = str(error)
    raise InputError(f"{image} cannot be read as 8-bit RGB without loss ({reason}): convert it or move it away")
