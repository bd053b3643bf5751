"""The folder of one run: its settings, its images and what was measured on them, so that the run can be continued.

    run.json             the settings that define the images, and the environment in which the run began
    images/000000.png    one file per image
    batches/000000.npz   one record per batch, written after its images: their numbers, features, logits, sizes, times
    grid.png             the first images in one, when all are there
    metrics.json         the run's scores and times, likewise
    .lock                held by the launch that writes to the folder

Every file appears whole or not at all. An image depends on the settings and its number alone, so a batch that has lost
a file is made again. A record names its images, so batches may differ in size; its file is named by the first image.
"""

import contextlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from util.errors import InputError, describe_differences
from util.files import atomic_write
from util.images import encode_png, image_grid
from util.processes import GO_ON

PAIRS_PER_ROW, PAIRS_SHOWN = 10, 40  # of `side_by_side`
IMAGES = ("images/*.png", "batches/*.npz")  # what a run consists of
FACTS = ("indices", "png_bytes", "sample_seconds", "decode_seconds", "first")  # of a record, besides outputs


@dataclass
class Batch:
    """Images that are made together. What is not known yet, or no longer, is None, nan or empty."""

    indices: Sequence[int]  # numbers of the images in the run
    latents: torch.Tensor | None = None  # [n, C, h, w], as the sampler makes them
    pixels: np.ndarray | None = None  # uint8 [n, H, W, 3]
    png_bytes: Sequence[int] = ()  # size of each PNG, 0 for an image that is not kept
    outputs: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [n, ...], as an `Extractor` names them
    sample_seconds: float = math.nan
    decode_seconds: float = math.nan
    first: bool = False  # its times include one-time work


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path
    labels: Sequence[int]  # the class of each image
    num_saved: int = 0  # images whose PNG is wanted, from the first one on

    def image_path(self, index: int) -> Path:
        return self.path / "images" / f"{index:06d}.png"

    def finished(self) -> Iterator[Batch]:
        """Yield the batches that have lost nothing. Their pixels are in the PNGs alone."""
        sizes = {path: path.stat().st_size for path in (self.path / "images").glob("*.png")}
        for path in sorted((self.path / "batches").glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as record:
                    arrays = dict(record)  # reads all of it, and compares checksums
                facts = {name: arrays.pop(name).tolist() for name in FACTS}
            except Exception:  # a damaged archive fails in zipfile, zlib or NumPy's header parser
                continue
            batch = Batch(**facts, outputs=arrays)
            saved = [index for index in batch.indices if index < self.num_saved]
            if all(sizes.get(self.image_path(index)) == size for index, size in zip(saved, batch.png_bytes)):
                yield batch

    def missing(self) -> list[int]:
        """Return the numbers of the images that no finished batch holds."""
        finished = {index for batch in self.finished() for index in batch.indices}
        return sorted(set(range(len(self.labels))) - finished)

    def outputs(self) -> dict[str, torch.Tensor]:
        """Read the outputs of all images [N, ...] by name, in the order of their numbers; nan for what is missing."""
        outputs: dict[str, torch.Tensor] = {}
        for batch in self.finished():
            for name, values in batch.outputs.items():
                if name not in outputs:
                    outputs[name] = torch.full((len(self.labels), *values.shape[1:]), math.nan, dtype=torch.float32)
                outputs[name][batch.indices] = torch.from_numpy(values).float()
        return outputs

    def seconds(self) -> dict[str, float]:
        """Return the mean seconds per image by part, as `metrics.json` holds them."""
        batches = list(self.finished())
        # A process's first batches include one-time work, so they count only where there are no others.
        batches = [batch for batch in batches if not batch.first] or batches
        count = sum(len(batch.indices) for batch in batches)
        sampling = sum(batch.sample_seconds for batch in batches) / count
        decoding = sum(batch.decode_seconds for batch in batches) / count
        return {
            "seconds_per_image": sampling + decoding,
            "sampling_seconds": sampling,
            "decoding_seconds": decoding,
            "timed_images": count,
        }

    def read_image(self, index: int) -> np.ndarray:
        """Read the pixels of one image, uint8 [H, W, 3]."""
        try:
            with Image.open(path := self.image_path(index), formats=["PNG"]) as image:
                return np.array(image)
        except (OSError, SyntaxError) as error:
            raise InputError(f"{path} cannot be read ({error}): delete it and repeat the run's command") from None

    def save(self, batch: Batch) -> None:
        """Write a batch: first its images, then its record."""
        assert batch.pixels is not None
        pngs = [encode_png(each) for index, each in zip(batch.indices, batch.pixels) if index < self.num_saved]
        for index, png in zip(batch.indices, pngs):  # the numbers rise, so that images to be kept come first
            self.write(f"images/{index:06d}.png", png)
        batch.png_bytes = [*map(len, pngs), *[0] * (len(batch.indices) - len(pngs))]
        arrays: dict[str, Any] = {**{name: getattr(batch, name) for name in FACTS}, **batch.outputs}
        record = io.BytesIO()
        np.savez(record, **arrays)
        self.write(f"batches/{batch.indices[0]:06d}.npz", record.getvalue())

    def write(self, name: str, content: bytes) -> None:
        """Write one of the folder's files. Raises InputError if that fails, also if the folder has gone."""
        try:
            (self.path / "run.json").stat()  # a folder that has gone is not made again
            with atomic_write(self.path / name) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path}: {error.strerror}; nothing written before is damaged, and once that is "
                f"put right, {GO_ON}"
            ) from error


def labels_of(settings: Mapping[str, Any]) -> list[int]:
    """Return the class of each image of a run: the chosen classes, or else all classes, take turns."""
    classes = settings["class_labels"] or range(settings["class_num"])
    return [classes[index % len(classes)] for index in range(settings["num_images"])]


def open_finished(path: Path) -> tuple[dict[str, Any], dict[str, Any], RunFolder]:
    """Read a finished run: its settings, its metrics and its folder. Raises InputError if it has not finished."""
    metrics = _read(path / "metrics.json")
    if not metrics:
        raise InputError(f"{path}/metrics.json does not exist: name a run's folder, or finish that run with eval.py")
    return metrics["settings"], metrics, RunFolder(path, labels_of(metrics["settings"]))


def side_by_side(*runs: RunFolder) -> bytes:
    """Draw a PNG of images of the same seeds: rows of the first run, and below each the row of the second."""
    indices = [index for index in range(len(runs[0].labels)) if all(run.image_path(index).exists() for run in runs)]
    if not indices:
        raise InputError(f"{runs[0].path} and {runs[1].path} share no images: run both with --save_images")
    starts = range(0, min(len(indices), PAIRS_SHOWN), PAIRS_PER_ROW)
    rows = [indices[start : start + PAIRS_PER_ROW] for start in starts]
    images = [run.read_image(index) for row in rows for run in runs for index in row]
    return encode_png(image_grid(images, columns=min(PAIRS_PER_ROW, len(indices))))


@contextlib.contextmanager
def open_folder(
    path: Path, settings: Mapping[str, Any], environment: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[None]:
    """Begin a run, or check that the one in the folder can be continued; hold the folder's lock within the block.

    Half-written files of a killed process are removed. The kernel releases the lock when a process ends.

    Args:
        settings:    what the images and their scores depend on, as JSON holds it.
        environment: what their rounding depends on; a note is printed if it has changed.
        overwrite:   delete the run that is there.

    Raises InputError if the folder holds another run or other files, is in use, or cannot be written.
    """
    import fcntl  # not on Windows

    try:
        for folder in (path / "images", path / "batches"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {path}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output_dir {path} is in use by another launch: choose another folder") from None
        except OSError:  # a file system without locks
            pass
        check_folder(path, settings, overwrite)
        _begin_or_continue(path, {"settings": settings, "environment": environment}, overwrite)
        yield


def _begin_or_continue(path: Path, run: Mapping[str, Any], overwrite: bool) -> None:
    for file in path.rglob(".*.partial"):
        file.unlink(missing_ok=True)
    for pattern in (*IMAGES, "grid.png", "metrics.json", "run.json") if overwrite else ():
        for file in path.glob(pattern):
            file.unlink()
    if not _has_images(path):
        with atomic_write(path / "run.json") as partial:
            partial.write_text(json.dumps(run, indent=2))
    elif changed := describe_differences(_read(path / "run.json").get("environment", {}), run["environment"]):
        print(f"note: images from here on may be rounded differently ({'; '.join(changed)})", flush=True)


def check_folder(path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
    """Raise InputError if a folder, which may not exist, holds files but no run, or a run with other settings that is
    not to be overwritten.
    """
    foreign = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".partial")
    if not (path / "run.json").exists() and any(file.name not in (".lock", "run.json") for file in foreign):
        raise InputError(f"--output_dir {path} holds files, but no run of eval.py: choose another folder")
    there = _read(path / "run.json") if _has_images(path) and not overwrite else {}
    if differences := describe_differences(there.get("settings", {}), settings):
        raise InputError(
            f"{path} holds a run with other settings ({'; '.join(differences[:4])}): give those, choose another "
            "--output_dir, or give --overwrite to delete that run; `score.py evaluate` scores images that are there"
        )


def _has_images(path: Path) -> bool:
    return any(next(path.glob(pattern), None) for pattern in IMAGES)


def _read(file: Path) -> dict[str, Any]:
    """Read `run.json` or `metrics.json`; return nothing if there is no such file."""
    try:
        content = json.loads(file.read_text())
        return {**content, "settings": dict(content["settings"])}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, KeyError) as error:
        way_out = "repeat the run's command" if file.name == "metrics.json" else "give --overwrite"
        raise InputError(f"{file} is damaged ({type(error).__name__}: {error}): {way_out}") from None
