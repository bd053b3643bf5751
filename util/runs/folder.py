"""The folder of one run: its settings, its images and what was measured on them, so that the run can be continued.

    run.json             the settings that define the images, and the versions with which the run began
    images/000000.png    one file per image
    batches/000000.npz   one file per batch, written after its images: their features and logits, sizes and times
    grid.png             the first images in one, when all are there
    metrics.json         the run's scores and times, likewise

Every file appears whole or not at all. An image depends on the settings and its number alone, so a batch that has
lost a file is made again, and only the lost file is written.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from PIL import Image

from util.errors import InputError, describe_differences
from util.files import atomic_write
from util.machine import launch_name
from util.runs.images import encode_png
from util.runs.methods import IMPLIED

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
READERS = 16  # files examined side by side: on a network drive each costs a wait rather than work
DISK_BLOCK = 4096  # bytes that a file takes at least


@dataclass
class Batch:
    """Images that are made together. What is not known yet, or not any more, is None or nan."""

    number: int
    indices: range  # numbers of the images in the run
    labels: Sequence[int]  # their classes
    latents: torch.Tensor | None = None  # [n, C, h, w], as the sampler makes them
    pixels: np.ndarray | None = None  # uint8 [n, H, W, 3]
    features: np.ndarray | None = None  # float32 [n, F], for FID
    logits: np.ndarray | None = None  # float32 [n, K], for IS
    dinov2: np.ndarray | None = None  # float32 [n, 1024], for FD-DINOv2
    sample_seconds: float = math.nan
    decode_seconds: float = math.nan
    score_seconds: float = math.nan
    first: bool = False  # its times hold one-time costs: the first of its size, or the second, which a GPU captures
    worker: str = ""  # host and device


NOT_RECORDED = ("number", "indices", "labels", "latents", "pixels")
RECORDED = [field.name for field in dataclasses.fields(Batch) if field.name not in NOT_RECORDED]


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, in a folder that `open_folder` has made."""

    path: Path
    labels: Sequence[int]  # the class of each image
    batch_size: int  # batch b holds the images b * batch_size and up
    image_size: int  # pixels per side
    extractor: str | None  # what the features must come from, by a name that changes with its weights; None: no scores
    saved: Callable[[int], bool]  # says whether an image's PNG is wanted, given the image's number
    dinov2: str | None = None  # as `extractor`, for DINOv2's features; None: they are not wanted

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def indices(self, number: int) -> range:
        """Numbers of a batch's images."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.num_images))

    def count_images(self, batches: Iterable[int]) -> int:
        """The number of images in these batches."""
        return sum(len(self.indices(number)) for number in batches)

    def batch_numbers(self) -> range:
        return range(-(-self.num_images // self.batch_size))

    def image_path(self, index: int) -> Path:
        return self.path / "images" / f"{index:06d}.png"

    def batch_path(self, number: int) -> Path:
        return self.path / "batches" / f"{number:06d}.npz"

    # What is there

    def unfinished(self) -> list[int]:
        """Numbers of the batches of which a file is missing or damaged."""
        with ThreadPoolExecutor(READERS) as readers:
            finished = readers.map(self._is_finished, self.batch_numbers())
            return [number for number, is_finished in zip(self.batch_numbers(), finished) if not is_finished]

    def _is_finished(self, number: int) -> bool:
        count = len(self.indices(number))
        try:
            with np.load(self.batch_path(number), allow_pickle=False) as record:
                sizes = record["png_bytes"].tolist()
                lengths = {len(sizes)}
                if self.extractor is not None:
                    # Reading the numbers compares their checksums.
                    lengths |= {len(record["features"]), len(record["logits"])}
                    if record["extractor"].item() != self.extractor:
                        return False
                if self.dinov2 is not None:
                    lengths.add(len(record["dinov2"]))
                    if record["dinov2_extractor"].item() != self.dinov2:
                        return False
        except Exception:  # a damaged archive fails in zipfile, zlib or NumPy's header parser, each with its own
            return False
        wanted = [(index, size) for index, size in zip(self.indices(number), sizes) if self.saved(index)]
        return lengths == {count} and all(_is_whole(self.image_path(index), size) for index, size in wanted)

    def check_disk(self, unfinished: Sequence[int]) -> None:
        """Raise InputError if there is no room for the files of these batches."""
        need, free = self._disk_need(unfinished), shutil.disk_usage(self.path).free
        if need > free:
            raise InputError(
                f"--output_dir {self.path} needs about {need / 1e9:.3f} GB more, and {free / 1e9:.3f} GB are free: "
                "make room, choose another folder, or give --no-save_images"
            )

    def _disk_need(self, batches: Sequence[int]) -> int:
        """Bytes that batches take, generously: a photograph's PNG 0.7 of its pixels, Inception's features 12.5 KB.

        DINOv2's features take 4.2 KB.
        """
        images = [index for number in batches for index in self.indices(number)]
        png = int(0.7 * 3 * self.image_size**2) + DISK_BLOCK
        features = (0 if self.extractor is None else 12_500) + (0 if self.dinov2 is None else 4_200)
        return sum(map(self.saved, images)) * png + len(images) * features + len(batches) * 2 * DISK_BLOCK

    # Reading and writing

    def write(self, name: str, content: bytes) -> None:
        """Write one of the folder's files. Raises OSError, also if the folder has gone, which is not made again."""
        if not (self.path / "run.json").exists():
            raise FileNotFoundError(errno.ENOENT, "the folder of the run has gone", str(self.path))
        with atomic_write(self.path / name) as partial:
            partial.write_bytes(content)

    def save(self, batch: Batch) -> None:
        """Write a batch: first its images, then its record, each unless it is there already."""
        assert batch.pixels is not None
        sizes = []
        for index, pixels in zip(batch.indices, batch.pixels):
            png = encode_png(pixels) if self.saved(index) else b""
            path = self.image_path(index)
            if png and not (_is_whole(path, len(png)) and path.read_bytes() == png):
                self.write(f"images/{path.name}", png)
            sizes.append(len(png))
        if self._is_finished(batch.number):
            return
        values = {name: getattr(batch, name) for name in RECORDED if getattr(batch, name) is not None}
        if batch.dinov2 is not None:
            values["dinov2_extractor"] = np.array(self.dinov2 or "")
        record = io.BytesIO()
        np.savez(record, **values, png_bytes=np.array(sizes), extractor=np.array(self.extractor or ""))
        self.write(f"batches/{self.batch_path(batch.number).name}", record.getvalue())

    def read(self, number: int) -> Batch:
        """Read the record of a finished batch; its pixels are in its images."""
        with np.load(self.batch_path(number), allow_pickle=False) as record:
            values = {name: record[name] for name in RECORDED if name in record}
        values = {name: value if value.ndim else value.item() for name, value in values.items()}
        return self._batch(number, **values)

    def resume(self, number: int) -> Batch:
        """Read all that is there of an unfinished batch: its pixels if no image is missing, and its record if any."""
        try:
            batch = self.read(number)
        except Exception:  # missing or damaged, see `_is_finished`
            batch = self._batch(number)
        batch.pixels = self.read_pixels(number)
        return batch if batch.pixels is not None else self._batch(number)

    def _batch(self, number: int, **values: Any) -> Batch:
        indices = self.indices(number)
        return Batch(number, indices, self.labels[indices.start : indices.stop], **values)

    def read_image(self, index: int) -> np.ndarray:
        """Read the pixels of one image, uint8 [H, W, 3]."""
        with Image.open(self.image_path(index)) as image:
            return np.array(image)

    def read_pixels(self, number: int) -> np.ndarray | None:
        """Read a batch's pixels, uint8 [n, H, W, 3], from its PNGs; None unless all are there and whole."""
        try:
            return np.stack([self.read_image(index) for index in self.indices(number)])
        except (OSError, SyntaxError):  # the latter is Pillow's, for some damages
            return None


def open_folder(
    path: Path,
    settings: dict,
    environment: dict,
    *,
    digests: Callable[[], dict] = dict,
    overwrite: bool = False,
) -> dict:
    """Make the folder of a run, or see that the run that it holds can be continued; return all of the run's settings.

    What can be refused is refused before long work: first the folder itself, then settings that are known without work,
    last those that take some. A folder without a finished batch takes new settings. What a killed process has left
    half-written is cleared away, and a note is printed if the environment is another than that in which the run began.

    Args:
        path:        the folder.
        settings:    what the images depend on, as far as it is known without work.
        environment: versions, code and processor, which may change how numbers are rounded.
        digests:     computes the other settings.
        overwrite:   delete the run that is there, unless torchrun has restarted the very command that began it.

    Raises:
        InputError: the folder cannot be written, holds something else, or holds a run with other settings.
        OSError:    `run.json` cannot be written.
    """
    try:
        if not (path / "run.json").exists() and any(map(_is_foreign, path.rglob("*"))):
            raise InputError(f"--output_dir {path} holds files, but no run of eval.py: choose another folder")
        for folder in (path / "images", path / "batches"):
            with atomic_write(folder / "writable") as probe:
                probe.write_bytes(b"?")
            (folder / "writable").unlink()
        if overwrite and launch_name() and f'"begun_by": "{launch_name()}"' in _text(path / "run.json"):
            print(
                f"note: {path} was begun by this launch of torchrun and goes on; for --overwrite by a new launch, give "
                f"it another --rdzv_id than {launch_name()}",
                flush=True,
            )
        elif overwrite:
            for pattern in ("images/*.png", "batches/*.npz", "grid.png", "metrics.json", "run.json"):
                for file in path.glob(pattern):
                    file.unlink()
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {path}: {error.strerror}") from error
    there, began = _read(path)
    _check_settings(path, there, settings)
    settings = {**settings, **digests()}
    _check_settings(path, there, settings)

    if not there or _differences(there, settings):  # there is no run, or none that has finished a batch
        content = {"settings": settings, "environment": environment, "begun_by": launch_name()}
        with atomic_write(path / "run.json") as partial:
            partial.write_text(json.dumps(content, indent=2))
    elif changed := _differences(began, environment):
        print(f"note: images from here on may be rounded differently ({'; '.join(changed)})", flush=True)
    for folder in (path, path / "images", path / "batches"):
        for file in folder.glob("*.partial"):
            file.unlink(missing_ok=True)
    return settings


def check_folder(path: Path, settings: dict) -> None:
    """Raise InputError if a folder, which need not be there, holds a run that was begun with other settings."""
    _check_settings(path, _read(path)[0], settings)


def holds_other_run(path: Path, settings: dict) -> bool:
    """True if `check_folder` refuses these settings."""
    try:
        check_folder(path, settings)
    except InputError:
        return True
    return False


def _check_settings(path: Path, there: dict, settings: dict) -> None:
    """Raise InputError if a batch has been finished with other settings, given those that are `there`."""
    differences = _differences(there, settings)
    if not differences or not any((path / "batches").glob("*.npz")):
        return
    way_out = "choose another --output_dir, or give --overwrite to delete that run"
    version = there["sampler_version"]
    if version != settings.get("sampler_version", version):
        raise InputError(
            f"{path} holds a run of version {version} of the sampler, and version {settings['sampler_version']} "
            f"makes other images: finish it with the code that began it, {way_out}"
        )
    more = f"; {len(differences) - 4} more" if len(differences) > 4 else ""
    raise InputError(
        f"{path} holds a run with other settings ({'; '.join(differences[:4])}{more}): give those, {way_out}"
    )


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _read(path: Path) -> tuple[dict, dict]:
    """Read settings and environment from `run.json`, each as one level; empty if there is no such file."""
    file = path / "run.json"
    try:
        content = json.loads(file.read_text())
        settings, environment = _flat(content["settings"]), _flat(content["environment"])
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error!r}): give --overwrite to delete that run") from None
    if "sampler_version" not in settings:  # written when a digest of the code stood in its place
        settings["sampler_version"] = 1
        environment.setdefault("code", settings.pop("code", "unknown"))
    return settings, environment


def _is_foreign(path: Path) -> bool:
    return path.is_file() and path.suffix != ".partial"


def _is_whole(png: Path, size: int) -> bool:
    try:
        with png.open("rb") as file:
            if size < len(PNG_END) or os.fstat(file.fileno()).st_size != size:
                return False
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def _flat(settings: dict, prefix: str = "") -> dict:
    """Flatten nested settings to one level, as JSON has them: {"cache": {"a": 5}} becomes {"cache.a": 5}."""
    flat = {}
    for name, value in json.loads(json.dumps(settings)).items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def _differences(there: dict, now: dict) -> list[str]:
    """Describe the settings that both name, or imply, with different values."""
    if there:
        there, now = {**IMPLIED, **there}, {**IMPLIED, **_flat(now)}
    return describe_differences(there, now)
