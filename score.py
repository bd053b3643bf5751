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

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from tqdm import tqdm

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("folder", type=Path, metavar="FOLDER", help="holds PNG or JPEG images of one size")
    common.add_argument(
        "--features",
        choices=sorted(FEATURES_DIMS),
        default="inception",
        help="network that the features come from: Inception, the standard (default), or the Fashion-MNIST "
        "classifier for images of mar_tiny, whose numbers compare with no others",
    )
    common.add_argument(
        "--inception_weights",
        type=Path,
        metavar="FILE",
        help=f"{INCEPTION_FILE} of torch-fidelity's release (default: PyTorch's hub folder, downloaded if need be)",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    common.add_argument("--device", default=default_device, help="cpu, cuda or cuda:N (default here: %(default)s)")
    common.add_argument("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")

    statistics = commands.add_parser(
        "statistics", parents=[common], help="make a reference file of mean and covariance from a folder of images"
    )
    statistics.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    statistics.set_defaults(run=make_statistics)

    evaluation = commands.add_parser(
        "evaluate", parents=[common], help="FID and Inception Score of a folder of images against a reference file"
    )
    evaluation.add_argument("--statistics", type=Path, required=True, metavar="FILE", help=".npz file of mu and sigma")
    evaluation.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    evaluation.set_defaults(run=evaluate)
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch_size {args.batch_size}: give 1 or more.")
    if args.inception_weights and args.features != "inception":
        raise InputError(f"--inception_weights has no use with --features {args.features}: leave one of them out.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {args.device} is not there: use cpu, or cuda on a machine with a GPU.") from None
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
