"""Score images that are already on disk: FID, Inception Score, precision and recall, KID and FD-DINOv2.

    python score.py statistics REAL_IMAGES --keep_features 10000 --output reference.npz
    python score.py evaluate GENERATED_IMAGES --reference reference.npz --precision_recall --kid
    python score.py export output/RUN --output samples.npz

Images are PNG or JPEG files in a folder or its class subfolders, the folder of a run of eval.py, or an .npz file as
ADM's evaluator takes it (arr_0, uint8).
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util import metrics
from util.cli import Parser, number
from util.errors import InputError, exits_cleanly
from util.extractors import FEATURES_DIMS, INCEPTION_FILE, Extractor, load_extractor
from util.files import atomic_write, check_writable
from util.image_sets import ImageSet, open_images
from util.machine import choose_device, describe
from util.metrics import Statistics


def statistics(args: argparse.Namespace, images: ImageSet) -> None:
    """Make a reference file of mean and covariance from images."""
    device = choose_device(args.device)
    extractor = load_extractor(args.features, args.inception_weights, device, with_dinov2=args.fd_dinov2)
    statistics_of(images, extractor, args.batch_size, args.keep_features).save(args.output)
    print(f"{args.output}: statistics of {images}, with the features of {args.keep_features}")


def evaluate(args: argparse.Namespace, own: ImageSet) -> None:
    """Score images against a reference: a statistics file, or images too."""
    names, real = metrics.metrics_from_flags(args), open_images(args.reference)
    reference: Any = None if real else Statistics.load(args.reference, FEATURES_DIMS[args.features], names)
    if real and own.shape != real.shape:
        raise InputError(f"the images' shapes, {own.shape} and {real.shape}, differ: make them one size")
    device = choose_device(args.device)
    with_dinov2 = metrics.needs_dinov2(names)
    extractor = load_extractor(args.features, args.inception_weights, device, with_dinov2=with_dinov2)
    if real:
        reference = statistics_of(real, extractor, args.batch_size, keep=len(real))
    outputs = extract(extractor, own, args.batch_size)
    scores = metrics.score(outputs, reference, names, standard_errors=args.standard_errors)
    print(f"images: {own}\nreference: {real or args.reference}\n{metrics.score_table(scores, args.features)}")
    if args.output:
        scores.update(num_images=len(own), features=args.features, environment=describe(device))
        scores.update(folder=str(args.images), statistics=str(args.reference))
        with atomic_write(args.output) as partial:
            partial.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def export(args: argparse.Namespace, images: ImageSet) -> None:
    """Write images in random order to an .npz file for ADM's evaluator."""
    # It takes its Inception Score over consecutive parts: of images that are sorted by class it would be far too low.
    pixels = torch.cat(list(images.batches(100))).permute(0, 2, 3, 1).numpy()
    order = np.random.RandomState(args.seed).permutation(len(images))
    with atomic_write(args.output) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=pixels[order])
    print(f"{args.output}: {images} in random order, as ADM's evaluator takes them")


def extract(extractor: Extractor, images: ImageSet, batch_size: int) -> dict[str, Tensor]:
    """Compute the extractor's outputs of all images, by name; they are on the CPU."""
    total = -(-len(images) // batch_size)
    with tqdm(images.batches(batch_size), "extracting features", total, unit="batch") as batches:
        parts = [{name: output.cpu() for name, output in extractor(batch).items()} for batch in batches]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def statistics_of(images: ImageSet, extractor: Extractor, batch_size: int, keep: int) -> Statistics:
    """Compute the statistics of images, and keep the features of `keep` of them.

    Raises InputError if there are too few images.
    """
    least = max(2, keep)
    if len(images) < least:
        raise InputError(f"{images.path} holds {len(images)} images, not at least {least} (--keep_features)")
    computed = Statistics.from_features(**extract(extractor, images, batch_size), keep=keep)
    if images.has_statistics:  # of all the images that these were drawn from
        print(f"note: {images.path} holds mu and sigma, which are taken as they are; the rest is of its images")
        found = Statistics.load(images.path, len(computed.mu))
        computed = replace(computed, mu=found.mu, sigma=found.sigma)
    return computed


# fmt: off
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (statistics, evaluate, export):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        add = command.add_argument
        add("images", type=Path, help="folder of images of one size, folder of a run, or .npz file of images")
        if run is not evaluate:
            add("--output", type=Path, required=True, metavar="FILE", help="the .npz file to write")
        if run is export:
            add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="seed of the random order")
            continue
        add("--features", choices=sorted(FEATURES_DIMS), default="inception",
            help="network whose features are used; fashion is for images of mar_tiny, on a scale of its own")
        add("--inception_weights", type=Path, metavar="FILE",
            help=f"{INCEPTION_FILE} of torch-fidelity (default: PyTorch's hub folder, downloaded if missing)")
        add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto is a GPU if there is one")
        add("--batch_size", type=number(int, 1), default=64, metavar="N", help="images at a time")
        if run is evaluate:
            add("--reference", "--statistics", type=Path, required=True, metavar="PATH",
                help="what to compare with: a statistics file, or images as for the first argument")
            add("--json", type=Path, dest="output", metavar="FILE", help="write the scores to this file too")
            metrics.add_metric_flags(command)
            continue
        add("--keep_features", type=number(int, 0), default=0, metavar="N",
            help="images whose features are kept for precision, recall and KID, drawn at random; papers take 10000")
        add("--fd_dinov2", action="store_true", help="add mean and covariance of DINOv2's features, for --fd_dinov2")
    return parser.parse_args(argv)
# fmt: on


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output:
        check_writable(args.output)
        if args.output.exists() and args.output.samefile(args.images):
            raise InputError(f"{args.output} holds the images: choose another name for the output")
    images = open_images(args.images)
    if images is None:
        raise InputError(f"{args.images} holds no images: name a folder, or an .npz file of images (arr_0, uint8)")
    args.run(args, images)


if __name__ == "__main__":
    sys.exit(main())
