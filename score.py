"""Score images that are already in a folder, with torch-fidelity's FID and Inception Score.

    python score.py statistics REAL_IMAGES --output stats.npz
    python score.py evaluate GENERATED_IMAGES --statistics stats.npz

`eval.py` scores the images that it makes by itself. A folder's PNG and JPEG files are read in the order of their names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from tqdm import tqdm

from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write
from util.scoring.scores import FEATURES_DIMS, INCEPTION_FILE, Extractor, Statistics, load_extractor, score

ENDINGS = (".png", ".jpg", ".jpeg")


def find_images(folder: Path) -> list[Path]:
    """List a folder's PNG and JPEG files by name. Raises InputError if there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name one that holds PNG or JPEG images.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not paths:
        raise InputError(f"{folder} holds no PNG or JPEG images: name a folder with images directly in it.")
    return paths


def read_image(path: Path) -> torch.Tensor:
    """Read an image file as RGB pixels [3, H, W] uint8. Raises InputError if it is damaged or no image."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib.error and more
        raise InputError(f"{path} cannot be read as an image ({error}): make it again or remove it.") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_batches(paths: list[Path], batch_size: int) -> Iterator[torch.Tensor]:
    """Read images in batches [B, 3, H, W] uint8; the next batch is read while one is used."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    shape = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        following = pool.map(read_image, batches[0])
        for batch, next_batch in zip(batches, [*batches[1:], []]):
            images, following = list(following), pool.map(read_image, next_batch)
            shape = shape or images[0].shape
            for path, image in zip(batch, images):
                if image.shape != shape:
                    sizes = [f"{width} x {height}" for _, height, width in (image.shape, shape)]
                    raise InputError(f"{path} is {sizes[0]} pixels, but {paths[0]} {sizes[1]}: make them one size.")
            yield torch.stack(images)


def extract(extractor: Extractor, paths: list[Path], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute features [N, F] and logits [N, K] of image files; both come back on the CPU."""
    outputs = []
    with tqdm(total=len(paths), unit="image", desc="extracting features") as progress:
        for images in read_batches(paths, batch_size):
            outputs.append([output.cpu() for output in extractor(images)])
            progress.update(len(images))
    features, logits = (torch.cat(parts) for parts in zip(*outputs))
    return features, logits


def make_statistics(args: argparse.Namespace) -> None:
    check_writable(args.output)
    paths = find_images(args.folder)
    extractor = load_extractor(args.features, args.inception_weights, args.device)
    features, _ = extract(extractor, paths, args.batch_size)
    Statistics.from_features(features).save(args.output)
    print(f"{args.output}: mean and covariance of {extractor.features_dim} features of {len(paths)} images")


def evaluate(args: argparse.Namespace) -> None:
    if args.json:
        check_writable(args.json)
    paths = find_images(args.folder)
    reference = Statistics.load(args.statistics, FEATURES_DIMS[args.features])
    extractor = load_extractor(args.features, args.inception_weights, args.device)
    scores = score(*extract(extractor, paths, args.batch_size), reference)
    print(f"images: {len(paths)} of {args.folder}\nreference: {args.statistics}\n{scores.table(args.features)}")
    if args.json:
        report = {
            **scores.metrics(args.features),
            "notes": scores.notes,
            "num_images": len(paths),
            "folder": str(args.folder),
            "statistics": str(args.statistics),
            "features": args.features,
            "versions": {"torch": torch.__version__, "torch_fidelity": torch_fidelity.__version__},
        }
        try:
            with atomic_write(args.json) as partial:
                partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {args.json}: {error}.") from None


def check_writable(path: Path) -> None:
    """Raise InputError unless a file can be written there, now rather than after the work."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with atomic_write(path.with_name(path.name + ".test")) as partial:
            partial.touch()
        path.with_name(path.name + ".test").unlink()
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}): name another file.") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises InputError for what cannot be asked for."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], description: str) -> Parser:
        sub = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
        sub.add("folder", Path, "folder that holds PNG or JPEG images of one size")
        sub.add(
            "--features",
            str,
            "network whose features are used: Inception, the standard, or the Fashion-MNIST classifier for images of "
            "mar_tiny, whose scores compare with no others",
            default="inception",
            choices=sorted(FEATURES_DIMS),
        )
        sub.add(
            "--inception_weights",
            Path,
            f"{INCEPTION_FILE} of torch-fidelity's release",
            metavar="FILE",
            default_text="PyTorch's hub folder, downloaded if missing",
        )
        default_device = "cuda" if torch.cuda.is_available() else "cpu"
        sub.add("--device", str, "where to compute: cpu, cuda or cuda:N", default=default_device, metavar="DEVICE")
        sub.add("--batch_size", int, "images at a time", default=64, minimum=1)
        sub.set_defaults(run=run)
        return sub

    sub = command("statistics", make_statistics, "make a reference file of mean and covariance from a folder of images")
    sub.add("--output", Path, "the .npz file to write", required=True, metavar="FILE")
    sub = command("evaluate", evaluate, "compute FID and Inception Score of a folder of images")
    sub.add("--statistics", Path, "mean and covariance of the real images (.npz)", required=True, metavar="FILE")
    sub.add("--json", Path, "write the scores there, too", metavar="FILE")
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.inception_weights and args.features != "inception":
        raise InputError(f"--inception_weights has no use with --features {args.features}: leave one of them out.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {args.device} is not there: use cpu, or cuda on a machine with a GPU.") from None
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
