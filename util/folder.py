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

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from util.errors import InputError, describe_differences
from util.files import atomic_write
from util.images import encode_png, image_grid

OUTPUTS = ("features", "logits", "dinov2")  # arrays of a record, as an `Extractor` names them
PAIRS_PER_ROW, PAIRS_SHOWN = 10, 40  # of `side_by_side`
FACTS = ("sample_seconds", "decode_seconds", "first")


@dataclass
class Batch:
    """Images that are made together. What is not known yet, or no longer, is None, nan or missing."""

    indices: Sequence[int]  # numbers of the images in the run
    labels: Sequence[int]  # their classes
    latents: torch.Tensor | None = None  # [n, C, h, w], as the sampler makes them
    pixels: np.ndarray | None = None  # uint8 [n, H, W, 3]
    outputs: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [n, ...], by the names in `OUTPUTS`
    sample_seconds: float = math.nan
    decode_seconds: float = math.nan
    first: bool = False  # its times include one-time work


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path
    labels: Sequence[int]  # the class of each image
    num_saved: int = 0  # images whose PNG is wanted, from the first one on
    wanted: Mapping[str, str] = field(default_factory=dict)  # outputs, with the identity of the network behind each

    def image_path(self, index: int) -> Path:
        return self.path / "images" / f"{index:06d}.png"

    def batch_path(self, first_index: int) -> Path:
        return self.path / "batches" / f"{first_index:06d}.npz"

    def finished(self) -> Iterator[Batch]:
        """Yield the finished batches. Their pixels are in the PNGs alone."""
        return (batch for _, batch, is_scored in self._records() if batch is not None and is_scored)

    def missing(self) -> list[int]:
        """Return the numbers of the images that no finished batch holds."""
        finished = {index for batch in self.finished() for index in batch.indices}
        return sorted(set(range(len(self.labels))) - finished)

    def unfinished(self, batch_size: int) -> list[list[int]]:
        """Return the images of each batch that is to be made; remove the records of batches that have lost an image.

        A batch that lacks no images, but some of the wanted outputs, stays one batch, whatever its size.
        """
        lost, unscored = set(range(len(self.labels))), []
        for path, batch, is_scored in self._records():
            if batch is None:
                path.unlink()
                continue
            lost.difference_update(batch.indices)
            if not is_scored:
                unscored.append(list(batch.indices))
        return unscored + [sorted(lost)[start : start + batch_size] for start in range(0, len(lost), batch_size)]

    def _records(self) -> Iterator[tuple[Path, Batch | None, bool]]:
        """Yield each record's path, its batch, and whether the batch has all outputs that are wanted.

        The batch is None if the record is damaged, or if one of the images has to be made again.
        """
        sizes = {path: path.stat().st_size for path in (self.path / "images").glob("*.png")}
        for path in sorted((self.path / "batches").glob("*.npz")):
            try:
                batch, png_bytes, made_by = self._read(path)
            except Exception:  # a damaged archive fails in zipfile, zlib or NumPy's header parser
                yield path, None, False
                continue
            is_scored = self.wanted.items() <= made_by.items()
            is_there = (
                sizes.get(self.image_path(index)) == size if index < self.num_saved else is_scored
                for index, size in zip(batch.indices, png_bytes)
            )
            yield path, batch if all(is_there) else None, is_scored

    def _read(self, path: Path) -> tuple[Batch, list[int], dict[str, str]]:
        """Read a record: the batch, the sizes of its PNGs, and the identity of the network behind each output."""
        with np.load(path, allow_pickle=False) as record:
            arrays = dict(record)  # reads all of it, and compares checksums
        batch = self._batch(arrays["indices"].tolist())
        batch.outputs = {name: arrays[name] for name in OUTPUTS if name in arrays}
        for name in FACTS:
            setattr(batch, name, arrays[name].item())
        return batch, arrays["png_bytes"].tolist(), json.loads(arrays["made_by"].item())

    def _batch(self, indices: Sequence[int]) -> Batch:
        return Batch(indices, [self.labels[index] for index in indices])

    def outputs(self, name: str) -> np.ndarray:
        """Read one output of all images [N, ...], in the order of their numbers; nan for what is not finished."""
        outputs = np.empty(0)
        for batch in self.finished():
            if not len(outputs):
                outputs = np.full((len(self.labels), *batch.outputs[name].shape[1:]), np.nan, np.float32)
            outputs[batch.indices] = batch.outputs[name]
        return outputs

    def seconds(self) -> dict[str, float]:
        """Return the mean seconds per image by part, as `metrics.json` holds them; empty if nothing was timed."""
        times = [
            (batch.first, len(batch.indices), batch.sample_seconds, batch.decode_seconds)
            for batch in self.finished()
            if not math.isnan(batch.sample_seconds)
        ]
        if not times:
            return {}
        # A process's first batches include one-time work, so they count only where there are no others.
        times = [time for time in times if not time[0]] or times
        _, count, sampling, decoding = map(sum, zip(*times))
        return {
            "seconds_per_image": (sampling + decoding) / count,
            "sampling_seconds": sampling / count,
            "decoding_seconds": decoding / count,
            "timed_images": count,
        }

    def resume(self, indices: Sequence[int]) -> Batch:
        """Return an unfinished batch with what is there of it: its pixels if no image is missing, and its record."""
        batch = self._batch(indices)
        with contextlib.suppress(OSError, SyntaxError):  # the latter is Pillow's, for some damages
            batch.pixels = np.stack([self.read_image(index) for index in indices])
            recorded, _, _ = self._read(self.batch_path(indices[0]))
            if recorded.indices == indices:
                batch = replace(recorded, pixels=batch.pixels)
        return batch

    def read_image(self, index: int) -> np.ndarray:
        """Read the pixels of one image, uint8 [H, W, 3]."""
        with Image.open(self.image_path(index)) as image:
            return np.array(image)

    def save(self, batch: Batch) -> None:
        """Write a batch: first its images, unless they are there already, then its record."""
        assert batch.pixels is not None
        sizes = []
        for index, pixels in zip(batch.indices, batch.pixels):
            png = encode_png(pixels) if index < self.num_saved else b""
            path = self.image_path(index)
            if png and not (path.exists() and path.read_bytes() == png):
                self.write(f"images/{path.name}", png)
            sizes.append(len(png))
        made_by = json.dumps(dict(self.wanted) if batch.outputs else {})
        arrays: dict[str, Any] = {**batch.outputs, **{name: getattr(batch, name) for name in FACTS}}
        record = io.BytesIO()
        np.savez(record, indices=batch.indices, png_bytes=sizes, made_by=made_by, **arrays)
        self.write(f"batches/{self.batch_path(batch.indices[0]).name}", record.getvalue())

    def write(self, name: str, content: bytes) -> None:
        """Write one of the folder's files. Raises OSError, also if the folder has gone: it is not made again."""
        if not (self.path / "run.json").exists():
            raise FileNotFoundError(errno.ENOENT, "the folder of the run has gone", str(self.path))
        with atomic_write(self.path / name) as partial:
            partial.write_bytes(content)


def labels_of(settings: Mapping[str, Any]) -> list[int]:
    """Return the class of each image of a run: the chosen classes, or else all classes, take turns."""
    classes = settings["class_labels"] or range(settings["class_num"])
    return [classes[index % len(classes)] for index in range(settings["num_images"])]


def open_finished(path: Path) -> tuple[dict[str, Any], dict[str, Any], RunFolder]:
    """Read a finished run: its settings, its metrics and its folder. Raises InputError if it has not finished."""
    file = path / "metrics.json"
    try:
        metrics = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{file} does not exist: name a run's folder, or finish that run with eval.py first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}): run eval.py again") from None
    return metrics["settings"], metrics, RunFolder(path, labels_of(metrics["settings"]))


def side_by_side(*runs: RunFolder) -> bytes:
    """Draw a PNG of images of the same seeds: rows of the first run, and below each the row of the second."""
    indices = [index for index in range(len(runs[0].labels)) if all(run.image_path(index).exists() for run in runs)]
    if not indices:
        raise InputError(f"{runs[0].path} and {runs[1].path} share no images: run both with --save_images")
    images = [
        run.read_image(index)
        for start in range(0, min(len(indices), PAIRS_SHOWN), PAIRS_PER_ROW)
        for run in runs
        for index in indices[start : start + PAIRS_PER_ROW]
    ]
    return encode_png(image_grid(images, columns=min(PAIRS_PER_ROW, len(indices))))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make a run's folder if it is missing, and hold its lock. The kernel releases the lock when the process ends.

    Raises InputError if another launch holds the lock, or if the folder holds other files or cannot be written.
    """
    import fcntl  # not on Windows

    try:
        foreign = (file for file in path.rglob("*") if file.is_file() and file.suffix != ".partial")
        if not (path / "run.json").exists() and any(file.name != ".lock" for file in foreign):
            raise InputError(f"--output_dir {path} holds files, but no run of eval.py: choose another folder")
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
        yield


def open_folder(
    path: Path, settings: Mapping[str, Any], environment: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Begin the run of a `locked` folder, or check that the run in it can be continued.

    A folder without a finished batch takes other settings. Half-written files of a killed process are removed.

    Args:
        settings:    what the images depend on.
        environment: what their rounding depends on; a note is printed if it has changed.
        overwrite:   delete the run that is there.

    Raises InputError if the folder holds a run with other settings.
    """
    if overwrite:
        _clear(path)
    check_folder(path, settings)
    there, began = _read(path)
    if not there or describe_differences(there, _as_json(settings)):  # no run, or none with a finished batch
        _clear(path)
        with atomic_write(path / "run.json") as partial:
            partial.write_text(json.dumps({"settings": settings, "environment": environment}, indent=2))
    elif changed := describe_differences(began, environment):
        print(f"note: images from here on may be rounded differently ({'; '.join(changed)})", flush=True)
    for file in path.rglob(".*.partial"):
        file.unlink(missing_ok=True)


def check_folder(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if a folder, which may not exist, has a batch that was finished with other settings."""
    differences = describe_differences(_read(path)[0], _as_json(settings))
    if differences and any((path / "batches").glob("*.npz")):
        more = f"; {len(differences) - 4} more" if len(differences) > 4 else ""
        raise InputError(
            f"{path} holds a run with other settings ({'; '.join(differences[:4])}{more}): give those, choose another "
            "--output_dir, or give --overwrite to delete that run"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read settings and environment from `run.json`; both are empty if there is no such file."""
    file = path / "run.json"
    try:
        content = json.loads(file.read_text())
        return dict(content["settings"]), dict(content["environment"])
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error!r}): give --overwrite to delete that run") from None


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _clear(path: Path) -> None:
    """Delete a run's files, and nothing else."""
    for pattern in ("images/*.png", "batches/*.npz", "grid.png", "metrics.json", "run.json"):
        for file in path.glob(pattern):
            file.unlink()
