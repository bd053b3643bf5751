"""Sets of images on disk: a folder, the folder of a run, or an `.npz` file as ADM's evaluator takes it (`arr_0`)."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
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
NUM_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, in the order of their names."""

    path: Path  # their folder or file
    images: Sequence[Any]  # what `read` turns into pixels [H, W, 3] uint8
    read: Callable[[Any], np.ndarray]
    size: tuple[int, int]  # width and height
    has_statistics: bool = False  # the file also holds mu and sigma, as ADM's reference files do

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        return f"{len(self):,} images of {self.path}"

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Read images in batches [B, 3, H, W] uint8."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for start in range(0, len(self), batch_size):
                pixels = np.stack(list(pool.map(self.read, self.images[start : start + batch_size])))
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2)


def open_images(path: Path) -> ImageSet | None:
    """Look at a set of images; return None for a file that holds none.

    A folder's images may be in subfolders, such as one for each class. Files that are no images are named in a note.

    Raises InputError if there are no images, or if one cannot be read as 8-bit RGB without loss or has another size
    than the first.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: name a folder of images or an .npz file")
    if not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                return None
            images, has_statistics = file["arr_0"], "mu" in file and "sigma" in file
    except Exception as error:  # a damaged archive fails in zipfile, zlib or NumPy's header parser
        raise InputError(f"{path} is damaged ({why_unreadable(error)}): get it again") from None
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not images.size:
        found = f"{images.dtype} {list(images.shape)}"
        raise InputError(f"{path} holds arr_0 of {found}, which are no images: these are uint8 [N, H, W, 3]")
    return ImageSet(path, images, np.asarray, (images.shape[2], images.shape[1]), has_statistics)


def _open_folder(path: Path) -> ImageSet:
    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): name a folder of images")

    is_run = (path / "run.json").exists()
    walk = os.walk(path / "images" if is_run else path, onerror=refuse, followlinks=True)
    found = sorted(Path(folder, name) for folder, _, names in walk for name in names)
    files = [file for file in found if file.suffix.lower() in ENDINGS]
    others = [str(file) for file in found if file.suffix.lower() not in ENDINGS]
    if not files:
        raise InputError(f"{path} holds no PNG or JPEG images: name a folder that does")
    if others:
        print(f"note: left out what is no PNG or JPEG image, {len(others)} in all, such as {', '.join(others[:3])}")
    if is_run and len(files) != open_finished(path)[0]["num_images"]:
        raise InputError(f"{path} lacks images, and holds {len(files)}: finish the run, without --no-save_images")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        sizes = list(pool.map(_size_of, files))
    for file, size in zip(files, sizes):
        if size != sizes[0]:
            raise InputError(f"{file} has the size {size}, but {files[0]} has {sizes[0]}: make them one size")
    return ImageSet(path, files, _read, sizes[0])


def _size_of(path: Path) -> tuple[int, int]:
    """Return an image's width and height. Raises InputError unless it can be read as 8-bit RGB without loss."""
    try:
        with Image.open(path) as image:
            is_one_image = getattr(image, "n_frames", 1) == 1
            is_8_bit = image.mode in MODES and ";16" not in str(image.tile)  # Pillow converts 16 bits to 8
            has_alpha = "A" in image.mode or "transparency" in image.info
            is_opaque = not has_alpha or image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
            if is_one_image and is_8_bit and is_opaque:
                return image.size
            reason = f"its mode is {image.mode}, and it may have 16 bits, transparent pixels or several frames"
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib.error and more
        reason = str(error)
    raise InputError(f"{path} cannot be read as 8-bit RGB without loss ({reason}): convert it or move it away")


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:
        raise InputError(f"{path} cannot be read ({error}): make it again or move it away") from None
