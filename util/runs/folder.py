"""The folder of one run: its settings, its images and what was measured on them, so that the run can be continued.

    run.json             the settings that define the images, and the versions with which it began
    images/000000.png    one file per image
    batches/000000.npz   one file per batch, written after its images: their features and logits, sizes and times
    grid.png, metrics.json

Every file appears whole or not at all. An image depends on the settings and its number alone, so a batch that has
lost a file is made again, and only what was lost is written.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from util.errors import InputError
from util.files import atomic_write
from util.machine import launch_name
from util.runs.images import encode_png

PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
READERS = 16  # files examined side by side: on a network drive each costs a wait rather than work
DISK_BLOCK = 4096  # bytes that a file takes at least


@dataclass
class Batch:
    """Images that are made together. What is not known is None or nan."""

    number: int
    indices: range  # numbers of the images in the run
    pixels: np.ndarray | None = None  # uint8 [n, H, W, 3]
    features: np.ndarray | None = None  # float32 [n, F], for FID
    logits: np.ndarray | None = None  # float32 [n, K], for IS
    sample_seconds: float = math.nan
    decode_seconds: float = math.nan
    score_seconds: float = math.nan
    first: bool = False  # in its process, or the second on a GPU: one-time costs are in the times
    worker: str = ""  # host and device


RECORDED = [field.name for field in dataclasses.fields(Batch) if field.name not in ("number", "indices", "pixels")]


@dataclass(frozen=True)
class RunFolder:
    """The files of a run. `prepare` comes first."""

    path: Path
    num_images: int
    batch_size: int  # batch b holds the images b * batch_size and up
    image_size: int  # pixels per side
    extractor: str | None  # what the features must come from, by a name that changes with its weights; None: no scores
    saved: Callable[[int], bool]  # whether an image's PNG is wanted, by its number

    def indices(self, number: int) -> range:
        """Numbers of a batch's images."""
        return range(number * self.batch_size, min((number + 1) * self.batch_size, self.num_images))

    def batch_numbers(self) -> range:
        return range(-(-self.num_images // self.batch_size))

    def image_path(self, index: int) -> Path:
        return self.path / "images" / f"{index:06d}.png"

    def batch_path(self, number: int) -> Path:
        return self.path / "batches" / f"{number:06d}.npz"

    # Beginning and continuing

    def begin(self, settings: dict, environment: dict) -> list[int]:
        """Write `run.json` if it is new, clear away what a killed process left, and return the unfinished batches.

        Prints it if the environment (versions, code, processor) is another than that in which the run began.
        Raises InputError if there is no room for what is missing.
        """
        there, began = _read(self.path)
        if not there or _differences(there, settings):  # there is no run, or none that has finished a batch
            content = {"settings": settings, "environment": environment, "begun_by": launch_name()}
            self.write("run.json", json.dumps(content, indent=2).encode())
        elif changed := _differences(began, environment):
            print(f"note: images from here on may be rounded differently ({'; '.join(changed)})", flush=True)
        for folder in (self.path, self.path / "images", self.path / "batches"):
            for file in folder.glob("*.partial"):
                file.unlink(missing_ok=True)
        unfinished = self.unfinished()
        need, free = self._disk_need(unfinished), shutil.disk_usage(self.path).free
        if need > free:
            raise InputError(
                f"--output_dir {self.path} needs about {need / 1e9:.3f} GB more, and {free / 1e9:.3f} GB are free: "
                "make room, choose another folder, or give --no-save_images"
            )
        return unfinished

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
        except Exception:  # a damaged archive fails in zipfile, zlib or NumPy's header parser, each with its own
            return False
        wanted = [(index, size) for index, size in zip(self.indices(number), sizes) if self.saved(index)]
        return lengths == {count} and all(_is_whole(self.image_path(index), size) for index, size in wanted)

    def _disk_need(self, batches: list[int]) -> int:
        """Bytes, generously: the PNG of a photograph takes about 0.6 of its pixels, Inception's output 12 KB."""
        images = [index for number in batches for index in self.indices(number)]
        png = int(0.7 * 3 * self.image_size**2) + DISK_BLOCK
        features = 0 if self.extractor is None else 12_500
        return sum(map(self.saved, images)) * png + len(images) * features + len(batches) * 2 * DISK_BLOCK

    # Reading and writing

    def write(self, name: str, content: bytes) -> None:
        """Write one of the folder's files."""
        if name != "run.json" and not (self.path / "run.json").exists():
            raise FileNotFoundError(errno.ENOENT, "the folder of the run has gone", str(self.path))
        with atomic_write(self.path / name) as partial:
            partial.write_bytes(content)

    def save(self, batch: Batch) -> None:
        """Write a batch: first its images, then its record, each unless it is there already."""
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
        record = io.BytesIO()
        np.savez(record, **values, png_bytes=np.array(sizes), extractor=np.array(self.extractor or ""))
        self.write(f"batches/{self.batch_path(batch.number).name}", record.getvalue())

    def read(self, number: int) -> Batch:
        """What is known about a finished batch, without its pixels."""
        with np.load(self.batch_path(number), allow_pickle=False) as record:
            values = {name: record[name] for name in RECORDED if name in record}
        values = {name: value if value.ndim else value.item() for name, value in values.items()}
        return Batch(number, self.indices(number), **values)

    def known(self, number: int) -> Batch:
        """What is known about a batch, finished or not, without its pixels."""
        try:
            return self.read(number)
        except Exception:  # missing or damaged, see `_is_finished`
            return Batch(number, self.indices(number))

    def read_image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]."""
        with Image.open(self.image_path(index)) as image:
            return np.array(image)

    def read_pixels(self, number: int) -> np.ndarray | None:
        """uint8 [n, H, W, 3] of a batch, from its PNGs; None unless all are there and whole."""
        try:
            return np.stack([self.read_image(index) for index in self.indices(number)])
        except (OSError, SyntaxError):  # the latter is Pillow's, for some damages
            return None


def prepare(path: Path, settings: dict, *, overwrite: bool = False) -> None:
    """Make the folder of a run, or see that it can be written and that what it holds was made with these settings.

    To be called early, with the settings that are known without work, and again with all of them. A folder without a
    finished batch takes new settings. `overwrite` deletes the run that is there, unless torchrun has restarted the
    very command that began it.

    Raises:
        InputError: the folder cannot be written, holds something else, or its settings differ.
    """
    try:
        if not (path / "run.json").exists() and any(map(_is_foreign, path.rglob("*"))):
            raise InputError(f"--output_dir {path} holds files, but no run of eval.py: choose another folder")
        for folder in (path / "images", path / "batches"):
            with atomic_write(folder / "writable") as probe:
                probe.write_bytes(b"?")
            (folder / "writable").unlink()
        if overwrite and (launch_name() is None or f'"begun_by": "{launch_name()}"' not in _text(path / "run.json")):
            for pattern in ("images/*.png", "batches/*.npz", "grid.png", "metrics.json", "run.json"):
                for file in path.glob(pattern):
                    file.unlink()
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {path}: {error.strerror}") from error
    there, _ = _read(path)
    differences = _differences(there, settings)
    if differences and any((path / "batches").glob("*.npz")):
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
    """Settings and environment of `run.json`, each flat; empty if there is no such file."""
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
    """Nested settings as one level, as JSON has them: {"cache": {"start_step": 5}} is {"cache.start_step": 5}."""
    flat = {}
    for name, value in json.loads(json.dumps(settings)).items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def _differences(there: dict, now: dict) -> list[str]:
    """What both name and is not the same, in words."""
    return [
        f"{name} {there[name]} there, {value} now"
        for name, value in _flat(now).items()
        if name in there and there[name] != value
    ]
