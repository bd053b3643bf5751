"""Score images that are already on disk: FID, Inception Score, precision and recall, KID and FD-DINOv2.

    python score.py statistics REAL_IMAGES --keep_features 10000 --output reference.npz
    python score.py evaluate GENERATED_IMAGES --reference reference.npz --precision_recall --kid
    python score.py export output/RUN --output samples.npz

Images are in a folder of PNG or JPEG files, read in the order of their names; or in the folder of a run of `eval.py`,
which scores the images that it makes by itself; or in a `.npz` file as ADM's evaluator takes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
import torch_fidelity
from tqdm import tqdm

from util.cli import Parser
from util.errors import InputError, exits_cleanly
from util.files import atomic_write, check_writable
from util.scoring.scores import (
    FEATURES_DIMS,
    INCEPTION_FILE,
    Extractor,
    Metrics,
    Scores,
    Statistics,
    check_count,
    load_extractor,
    score,
    score_statistics,
)
from util.scoring.sources import ImageArray, Source, check_same_size, export, holds_images, open_images

IMAGES_HELP = "folder of PNG or JPEG images of one size, a run's folder, or an .npz file of images (arr_0, uint8)"


@dataclass(frozen=True)
class Side:
    """One of the two sets of images that are compared: images, or statistics of them in a file, or both."""

    path: Path
    images: Source | None
    statistics: Statistics | None

    @classmethod
    def open(cls, path: Path, features_dim: int, metrics: Metrics) -> Side:
        """Look at what a path names, without long work.

        Raises InputError unless it serves the `metrics`.
        """
        if not holds_images(path) and (path.is_file() or path.suffix == ".npz"):
            return cls(path, None, Statistics.load(path, features_dim, metrics))
        return cls.of_images(path, features_dim, metrics)

    @classmethod
    def of_images(cls, path: Path, features_dim: int, metrics: Metrics) -> Side:
        """Likewise, of a path that has to name images."""
        images = open_images(path)
        check_count(metrics, len(images), f"{path} holds")
        statistics = None
        if isinstance(images, ImageArray) and images.holds_statistics:
            statistics = Statistics.load(path, features_dim)
        return cls(path, images, statistics)

    def __str__(self) -> str:
        return str(self.path) if self.images is None else f"{len(self.images):,} images of {self.path}"


def extract(extractor: Extractor, images: Source, batch_size: int) -> list[torch.Tensor]:
    """Compute features [N, F], logits [N, K] and with DINOv2 its features [N, 1024]; all come back on the CPU."""
    outputs = []
    with tqdm(total=len(images), unit="image", desc="extracting features") as progress:
        for batch in images.batches(batch_size):
            outputs.append([output.cpu() for output in extractor(batch)])
            progress.update(len(batch))
    return [torch.cat(parts) for parts in zip(*outputs)]


def statistics_of(side: Side, extractor: Extractor, batch_size: int, keep: int | None) -> Statistics:
    """Statistics of a side, with `keep` of its features (None: all), from its file or else from its images."""
    if side.images is None:
        assert side.statistics is not None
        return side.statistics
    features, _, *dinov2 = extract(extractor, side.images, batch_size)
    statistics = Statistics.from_features(features, *dinov2, keep=keep)
    if side.statistics is not None:  # of all the images that these were drawn from
        print(f"note: {side.path} holds mu and sigma, which are taken as they are; the rest is of its images")
        statistics = replace(statistics, mu=side.statistics.mu, sigma=side.statistics.sigma)
    return statistics


def make_statistics(args: argparse.Namespace) -> None:
    check_extractor(args)
    check_writable(args.output)
    metrics = Metrics(fd_dinov2=args.fd_dinov2)
    side = Side.of_images(args.images, FEATURES_DIMS[args.features], metrics)
    assert side.images is not None
    if len(side.images) < max(2, args.keep_features):
        raise InputError(
            f"statistics take at least {max(2, args.keep_features)} images, and there are {len(side.images)} in "
            f"{args.images}: add images{' or lower --keep_features' if args.keep_features > 2 else ''}."
        )
    extractor = load_extractor(args.features, args.inception_weights, args.device, with_dinov2=metrics.fd_dinov2)
    statistics = statistics_of(side, extractor, args.batch_size, args.keep_features)
    statistics.save(args.output)
    kept = f", and the features of {args.keep_features} of them" if args.keep_features else ""
    print(f"{args.output}: mean and covariance of {extractor.features_dim} features of {len(side.images)} images{kept}")


def evaluate(args: argparse.Namespace) -> None:
    check_extractor(args)
    if args.json:
        check_writable(args.json)
    metrics = Metrics(args.precision_recall, args.kid, args.fd_dinov2, args.standard_errors)
    features_dim = FEATURES_DIMS[args.features]
    own = Side.open(args.images, features_dim, metrics)
    other = Side.open(args.reference, features_dim, replace(metrics, standard_errors=False))
    if other.images is not None and len(other.images) < 2:
        raise InputError(f"a reference takes at least 2 images, and {other.path} holds 1: add images.")
    if own.images is not None and other.images is not None:
        check_same_size(own.images, other.images)
    if own.images is None and metrics.standard_errors:
        raise InputError(f"--standard_errors needs images, and {own.path} holds statistics: name the images.")
    extractor = load_extractor(args.features, args.inception_weights, args.device, with_dinov2=metrics.fd_dinov2)
    reference = statistics_of(other, extractor, args.batch_size, keep=None)
    if own.images is None:
        assert own.statistics is not None
        scores = score_statistics(own.statistics, reference, metrics, progress=True)
    else:
        features, logits, *dinov2 = extract(extractor, own.images, args.batch_size)
        scores = score(features, logits, reference, metrics, *dinov2, progress=True)
    print(f"images: {own}\nreference: {other}\n{scores.table(args.features)}")
    if args.json:
        write_report(args, scores, None if own.images is None else len(own.images))


def write_report(args: argparse.Namespace, scores: Scores, num_images: int | None) -> None:
    """Write the scores and what they are of. Raises InputError if that cannot be done."""
    report = {
        **scores.metrics(args.features),
        "notes": scores.notes,
        "num_images": num_images,
        "folder": str(args.images),
        "statistics": str(args.reference),
        "features": args.features,
        "versions": {"torch": torch.__version__, "torch_fidelity": torch_fidelity.__version__},
    }
    try:
        with atomic_write(args.json) as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {args.json}: {error}.") from None


def export_images(args: argparse.Namespace) -> None:
    check_writable(args.output)
    images = open_images(args.images)
    export(images, args.output, args.seed)
    print(f"{args.output}: {len(images):,} images of {args.images} in random order, as ADM's evaluator takes them")


def check_extractor(args: argparse.Namespace) -> None:
    """Raise InputError for flags of the extractor that go with no other, and for a device that is not there."""
    if args.inception_weights and args.features != "inception":
        raise InputError(f"--inception_weights has no use with --features {args.features}: leave one of them out.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {args.device} is not there: use cpu, or cuda on a machine with a GPU.") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Raises InputError for what cannot be asked for."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], description: str) -> Parser:
        sub = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
        sub.add("images", Path, IMAGES_HELP)
        sub.set_defaults(run=run)
        return sub

    def add_extractor(sub: Parser) -> None:
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

    sub = command("statistics", make_statistics, "make a reference file of mean and covariance from images")
    sub.add("--output", Path, "the .npz file to write", required=True, metavar="FILE")
    sub.add(
        "--keep_features",
        int,
        "images whose features the file holds, too, drawn with a fixed seed: precision, recall and KID need them, and "
        "papers take 10,000",
        default=0,
        minimum=0,
    )
    add_extractor(sub)
    sub.add("--fd_dinov2", bool, "add mean and covariance of DINOv2's features, which eval.py --fd_dinov2 needs")
    sub = command("evaluate", evaluate, "score images, or a statistics file of them, against a reference")
    sub.add(
        "--statistics",
        Path,
        "what to compare with: a statistics file (.npz), or images as for the first argument",
        alias="--reference",
        dest="reference",
        required=True,
        metavar="REFERENCE",
    )
    add_extractor(sub)
    sub.add_fields(Metrics)
    sub.add("--json", Path, "write the scores there, too", metavar="FILE")
    sub = command("export", export_images, "write images as ADM's evaluator takes them, an .npz file in random order")
    sub.add("--output", Path, "the .npz file to write", required=True, metavar="FILE")
    sub.add("--seed", int, "seed of the order", default=0, minimum=0, maximum=2**32 - 1)
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
