"""Sets of images on disk: a folder, the folder of a run of `eval.py`, or a `.npz` file as ADM's evaluator takes it.

ADM's files hold the images as `arr_0`, uint8 [N, H, W, 3]; its reference files hold `mu` and `sigma`, too, of all
images that these were drawn from.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Union

import numpy as np
import torch
from PIL import Image

from util.errors import InputError, why_unreadable
from util.files import atomic_write

ENDINGS = (".png", ".jpg", ".jpeg")
IMAGES = "arr_0.npy"  # ADM's images within a .npz file
WRITTEN_AT_ONCE = 100  # images


@dataclass(frozen=True)
class ImageFolder:
    """PNG and JPEG files of one size, in the order of their names."""

    path: Path
    files: Sequence[Path]
    size: tuple[int, int]  # width and height

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Read images in batches [B, 3, H, W] uint8; the next batch is read while one is used."""
        batches = [self.files[start : start + batch_size] for start in range(0, len(self.files), batch_size)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            following = pool.map(_read_image, batches[0])
            for next_batch in [*batches[1:], []]:
                images, following = list(following), pool.map(_read_image, next_batch)
                yield torch.stack(images)


@dataclass(frozen=True)
class ImageArray:
    """Images in a `.npz` file, which are read from it batch by batch."""

    path: Path
    num_images: int
    size: tuple[int, int]  # width and height
    holds_statistics: bool  # mu and sigma, as in ADM's reference files

    def __len__(self) -> int:
        return self.num_images

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Read images in batches [B, 3, H, W] uint8. Raises InputError if the file is damaged."""
        width, height = self.size
        with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES) as stream:
            _read_header(stream)
            for start in range(0, self.num_images, batch_size):
                count = min(batch_size, self.num_images - start)
                try:
                    pixels = bytearray(stream.read(count * height * width * 3))
                    images = np.frombuffer(pixels, np.uint8).reshape(count, height, width, 3)
                except Exception as error:  # of zipfile, zlib or NumPy
                    raise InputError(f"{self.path} is damaged ({why_unreadable(error)}): get it again.") from None
                yield torch.from_numpy(images).permute(0, 3, 1, 2)


Source = Union[ImageFolder, ImageArray]


def holds_images(path: Path) -> bool:
    """True for a folder and for a `.npz` file of images; False for a statistics file, and for what is not there.

    Raises InputError for a `.npz` file that is damaged, or that holds neither images nor statistics.
    """
    if not path.is_file():
        return path.is_dir()
    names = _names(path)
    if IMAGES not in names and "mu.npy" not in names:
        raise InputError(
            f"{path} holds neither images (arr_0) nor statistics (mu and sigma), but {_listed(names)}: name a "
            "folder of images, ADM's .npz of images, or a file that `python score.py statistics` has made."
        )
    return IMAGES in names


def open_images(path: Path) -> Source:
    """Look at a set of images: how many there are, and of what size. None is decoded yet.

    Args:
        path: a folder with PNG or JPEG files, the folder of a run of `eval.py`, or a `.npz` file.

    Raises:
        InputError: there are no images, an image has another size than the first, or a file cannot be read.
    """
    return _open_array(path) if path.is_file() else _open_folder(path)


def check_same_size(first: Source, second: Source) -> None:
    """Raise InputError if two sets are of images of other sizes."""
    if first.size != second.size:
        sizes = ["{} x {} pixels".format(*each.size) for each in (first, second)]
        raise InputError(
            f"the images of {first.path} are {sizes[0]}, but those of {second.path} {sizes[1]}: make them one size."
        )


def export(source: Source, path: Path, seed: int) -> None:
    """Write images in random order as ADM's `.npz` file: `arr_0`, uint8 [N, H, W, 3].

    ADM's evaluator takes its Inception Score over consecutive parts, so images that are sorted by class would get far
    too low a score. All images are read before the first is written only if the source is a `.npz` file.

    Raises InputError if an image cannot be read or the file cannot be written.
    """
    width, height = source.size
    order = np.random.RandomState(seed).permutation(len(source))
    if isinstance(source, ImageFolder):
        shuffled: Source = ImageFolder(source.path, [source.files[index] for index in order], source.size)
        batches = shuffled.batches(WRITTEN_AT_ONCE)
    else:
        batches = iter(torch.cat(list(source.batches(WRITTEN_AT_ONCE)))[order].split(WRITTEN_AT_ONCE))
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(source), height, width, 3)}
    try:
        with (
            atomic_write(path) as partial,
            zipfile.ZipFile(partial, "w") as archive,
            archive.open(IMAGES, "w", force_zip64=True) as stream,
        ):
            np.lib.format.write_array_header_1_0(stream, header)
            for batch in batches:
                stream.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}.") from None


def _open_folder(path: Path) -> ImageFolder:
    if not path.is_dir():
        raise InputError(f"{path} is not a folder, nor a .npz file: name one that holds PNG or JPEG images.")
    wanted = None
    if (path / "run.json").exists():
        wanted = _images_of_run(path)
        path = path / "images"
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
    if not files:
        raise InputError(f"{path} holds no PNG or JPEG images: name a folder with images directly in it.")
    if wanted is not None and len(files) != wanted:
        raise InputError(
            f"{path} holds {len(files):,} of the run's {wanted:,} images: finish the run with eval.py, without "
            "--no-save_images."
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, size in zip(files, pool.map(_image_size, files)):
            if file == files[0]:
                first = size
            if size != first:
                sizes = ["{} x {}".format(*each) for each in (size, first)]
                raise InputError(f"{file} is {sizes[0]} pixels, but {files[0]} {sizes[1]}: make them one size.")
    return ImageFolder(path, files, first)


def _images_of_run(path: Path) -> int:
    """The number of images that the run of a folder is of."""
    try:
        return int(json.loads((path / "run.json").read_text())["settings"]["num_images"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'run.json'} is damaged ({error!r}): name the folder of images itself.") from None


def _open_array(path: Path) -> ImageArray:
    names = _names(path)
    way_out = "name an .npz file of images as ADM's evaluator takes it, arr_0, uint8 [N, H, W, 3]."
    if IMAGES not in names:
        raise InputError(f"{path} holds no images, but {_listed(names)}: {way_out}")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(IMAGES) as stream:
            shape, fortran_order, dtype = _read_header(stream)
    except Exception as error:  # of zipfile, zlib or NumPy
        raise InputError(f"{path} is damaged ({why_unreadable(error)}): get it again.") from None
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran_order or 0 in shape:
        raise InputError(f"{path} holds arr_0 of {dtype} {list(shape)}, which are no images: {way_out}")
    return ImageArray(path, shape[0], (shape[2], shape[1]), {"mu.npy", "sigma.npy"} <= set(names))


def _names(path: Path) -> list[str]:
    """The arrays in a `.npz` file. Raises InputError if it is none, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as an .npz file ({why_unreadable(error)}): name a folder of images or an .npz file."
        ) from None


def _listed(names: Sequence[str]) -> str:
    """The first arrays of a `.npz` file, for a message."""
    return ", ".join(name.removesuffix(".npy") for name in names[:5]) or "nothing"


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an array: its shape, whether it is in Fortran's order, and its dtype."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib.error and more
        raise _unreadable(path, error) from None


def _read_image(path: Path) -> torch.Tensor:
    """Read an image file as RGB pixels [3, H, W] uint8. Raises InputError if it is damaged or no image."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # as above
        raise _unreadable(path, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as an image ({error}): make it again or remove it.")
