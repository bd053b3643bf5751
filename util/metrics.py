"""FID, Inception Score, precision and recall, KID and FD-DINOv2, computed by torch-fidelity.

torch-fidelity itself compares two folders. Here its functions get the outputs of an `Extractor`, which are stored while
images are made, and a reference file: mean and covariance of the real images' features, and a sample of the features.

`METRICS` is the table of all scores: an entry is all that a further metric takes.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from util.download import download_command
from util.errors import InputError, why_unreadable
from util.extractors import DINOV2_DIM, import_torch_fidelity
from util.files import atomic_write

INCEPTION_SPLITS = 10  # parts of the images whose Inception Scores are averaged
NEIGHBORS = 3  # the ball around an image reaches to its third nearest neighbor
BLOCK_SIZE = 1000  # images whose distances to all others are in memory, for precision and recall
SUBSET_SIZE = 1000  # images in each of the subsets that KID is averaged over, if there are so many
GROUPS = 10  # of images, for the standard errors


@dataclass(frozen=True)
class Statistics:
    """What is known of the features of a set of images; None for what is not."""

    mu: np.ndarray  # [F] float64, their mean
    sigma: np.ndarray  # [F, F] float64, their covariance
    features: np.ndarray | None = None  # [M, F] float32, of all images or of a sample
    dinov2_mu: np.ndarray | None = None  # [1024] float64, of DINOv2's features
    dinov2_sigma: np.ndarray | None = None  # [1024, 1024] float64
    logits: Tensor | None = None  # [N, K] of all images; files do not hold them

    @classmethod
    def from_features(
        cls, features: Tensor, *, dinov2: Tensor | None = None, logits: Tensor | None = None, keep: int = 0
    ) -> "Statistics":
        """Compute the statistics of features [N, F] and, if given, of DINOv2's features [N, 1024]; N is at least 2.

        `keep` is the number of images whose features are kept, drawn with a fixed seed.

        Raises InputError, naming the first image, if a number is not finite.
        """
        moments: dict[str, Any] = {}
        for values in filter(torch.is_tensor, (features, dinov2, logits)):
            if broken := (~values.isfinite().all(dim=1)).nonzero().flatten().tolist():
                raise InputError(f"the features of {len(broken)} images are not finite, first of number {broken[0]}")
        for prefix, each in {"": features, "dinov2_": dinov2}.items():
            if each is not None:
                found = import_torch_fidelity().metric_fid.fid_features_to_statistics(each.cpu().double())
                moments.update({prefix + name: array for name, array in found.items()})
        kept = np.sort(np.random.RandomState(0).choice(len(features), keep, replace=False))
        return cls(**moments, features=features.cpu().numpy()[kept] if keep else None, logits=logits)

    @classmethod
    def load(cls, path: Path, features_dim: int, metrics: Sequence[str] = ()) -> "Statistics":
        """Read a `.npz` file of `mu` and `sigma`, and of `features`, `dinov2_mu` and `dinov2_sigma` if it holds them.

        Raises InputError if the file is missing or damaged, if it holds arrays of other shapes or numbers that are not
        finite, or if it lacks what one of the `metrics` needs.
        """
        shapes = {"mu": (features_dim,), "sigma": (features_dim, features_dim), "features": (features_dim,)}
        shapes |= {"dinov2_mu": (DINOV2_DIM,), "dinov2_sigma": (DINOV2_DIM, DINOV2_DIM)}
        needed = ["mu", "sigma", *(part for name in metrics for part in METRICS[name].needs)]
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name].astype(np.float64, casting="same_kind") for name in shapes if name in file}
            faults = [f"it lacks {name}" for name in needed if name not in arrays]
            for name, array in arrays.items():
                shape = array.shape[1:] if name == "features" else array.shape  # any number of images
                if shape != shapes[name] or not np.isfinite(array).all():
                    faults.append(f"{name} is {list(array.shape)}, not finite numbers of {shapes[name][0]} features")
        except Exception as error:  # a damaged archive fails in zipfile, zlib or NumPy's header parser
            faults = [why_unreadable(error)]
        if faults:
            command = "python score.py statistics FOLDER_OR_NPZ --keep_features 10000 --fd_dinov2 --output FILE"
            way_out = (not path.exists() and download_command(path)) or f"make one with `{command}`"
            raise InputError(f"the statistics file {path} cannot be used ({'; '.join(faults)}): {way_out}")
        if "features" in arrays:
            arrays["features"] = arrays["features"].astype(np.float32)
        return cls(**arrays)

    def save(self, path: Path) -> None:
        """Write a `.npz` file, whole or not at all."""
        arrays = {name: value for name, value in vars(self).items() if value is not None and name != "logits"}
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)


class Number(NamedTuple):
    """A number that a metric yields, under torch-fidelity's name of it in `metrics.json`."""

    label: str  # in tables
    key: str
    digits: int = 4  # printed after the point


class Metric(NamedTuple):
    """A score of a set of images against a reference.

    `measure` maps the statistics of the images and of the reference to values by their keys.
    """

    numbers: tuple[Number, ...]
    measure: Callable[[Statistics, Statistics], Mapping[str, float]]
    least: int = 2  # images that it takes, on both sides
    help: str = ""  # of the flag that asks for it, which is the metric's name; without help it is always computed
    needs: tuple[str, ...] = ()  # fields of `Statistics` besides mu and sigma, of the reference


def _frechet_distance(own: Statistics, reference: Statistics, prefix: str = "") -> dict[str, float]:
    moments = [{name: getattr(side, prefix + name) for name in ("mu", "sigma")} for side in (own, reference)]
    return import_torch_fidelity().metric_fid.fid_statistics_to_metric(*moments, verbose=False)


def _fd_dinov2(own: Statistics, reference: Statistics) -> dict[str, float]:
    return {"fd_dinov2": _frechet_distance(own, reference, "dinov2_")["frechet_inception_distance"]}


def _inception_score(own: Statistics, reference: Statistics) -> dict[str, float]:
    return import_torch_fidelity().metric_isc.isc_features_to_metric(own.logits, splits=INCEPTION_SPLITS)


def _precision_recall(own: Statistics, reference: Statistics) -> dict[str, float]:
    features = map(torch.from_numpy, (own.features, reference.features))  # generated images first
    options = {"prc_neighborhood": NEIGHBORS, "prc_batch_size": BLOCK_SIZE, "save_cpu_ram": True, "verbose": False}
    return import_torch_fidelity().metric_prc.prc_features_to_metric(*features, **options)


def _kid(own: Statistics, reference: Statistics) -> dict[str, float]:
    features = [torch.from_numpy(side.features) for side in (own, reference)]
    size = min(SUBSET_SIZE, *map(len, features))
    return import_torch_fidelity().metric_kid.kid_features_to_metric(*features, kid_subset_size=size, verbose=False)


METRICS = {
    "fid": Metric((Number("FID", "frechet_inception_distance"),), _frechet_distance),
    "inception_score": Metric(
        (Number("Inception Score", "inception_score_mean"),), _inception_score, least=INCEPTION_SPLITS
    ),
    "precision_recall": Metric(
        (Number("precision", "precision"), Number("recall", "recall")),
        _precision_recall,
        least=NEIGHBORS + 1,
        help=f"also compute precision and recall, by {NEIGHBORS} nearest neighbors; needs features of the reference",
        needs=("features",),
    ),
    "kid": Metric(
        (Number("KID", "kernel_inception_distance_mean", digits=6),),
        _kid,
        help="also compute the Kernel Inception Distance; needs features of the reference",
        needs=("features",),
    ),
    "fd_dinov2": Metric(
        (Number("FD-DINOv2", "fd_dinov2"),),
        _fd_dinov2,
        help="also compute the Frechet distance on features of DINOv2 (ViT-L/14); PyTorch's hub fetches the network "
        "from GitHub's facebookresearch/dinov2, code included",
        needs=("dinov2_mu", "dinov2_sigma"),
    ),
}


def needs_dinov2(metrics: Sequence[str]) -> bool:
    """Return whether one of the metrics is computed from features of DINOv2."""
    return any("dinov2_mu" in METRICS[name].needs for name in metrics)


def score(
    outputs: Mapping[str, Tensor],
    reference: Statistics,
    metrics: Sequence[str] = (),
    *,
    labels: Sequence[int] | None = None,
    standard_errors: bool = False,
) -> dict[str, Any]:
    """Score images as `torch_fidelity.calculate_metrics` does.

    Args:
        outputs:         of the extractor, by name, [N, ...] each. Their order decides the parts of the Inception Score.
        reference:       statistics of the images to compare with, which must serve the `metrics`.
        metrics:         names of the metrics besides those that are always computed.
        labels:          the images' classes, which the groups of the standard errors share evenly; None: not known.
        standard_errors: also estimate the standard error of each score, by the jackknife over groups of images.

    Returns the scores as `metrics.json` holds them: by name, None if there are too few images; and "standard_errors".

    Raises InputError if an output is not finite.
    """
    num_images = len(outputs["features"])
    own = Statistics.from_features(**outputs, keep=num_images) if num_images > 1 else None
    scores: dict[str, Any] = {}
    wanted = [metric for name, metric in METRICS.items() if name in metrics or not metric.help]
    for metric in tqdm(wanted, desc="scores", leave=False, disable=None):
        sample = reference.features if "features" in metric.needs else None
        count = num_images if sample is None else min(num_images, len(sample))
        if own is None or count < metric.least:
            scores.update({number.key: None for number in metric.numbers})
        else:
            scores.update(metric.measure(own, reference))
    if standard_errors:
        keys = [number.key for number, value in read_scores(scores).items() if value is not None]

        def measure(chosen: np.ndarray) -> list[float]:
            part = {name: values[torch.from_numpy(chosen)] for name, values in outputs.items()}
            of_part = scores if chosen.all() else score(part, reference, metrics)
            return [of_part[key] for key in keys]

        groups = groups_of_images(np.random.RandomState(0).permutation(num_images) if labels is None else labels)
        scores["standard_errors"] = {key: estimate.error for key, estimate in zip(keys, jackknife(measure, groups))}
    return scores


# Standard errors


class Estimate(NamedTuple):
    """A number and its standard error, which is nan if it is not known."""

    value: float
    error: float


def groups_of_images(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return a group number [N] for each image, given the classes [N], so that groups share each class evenly.

    Each image has its own random seed, so groups of images are as independent as runs with different seeds.
    """
    groups = np.empty(len(labels), int)
    groups[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % GROUPS
    return groups


def jackknife(measure: Callable[[np.ndarray], Sequence[float]], groups: np.ndarray) -> list[Estimate]:
    """Return numbers that are measured on all images, each with its standard error, nan if there is only one group.

    Args:
        measure: maps a mask [N] of images to the numbers measured on them.
        groups:  [N] the group of each image.
    """
    values, numbers = measure(np.ones(len(groups), bool)), np.unique(groups)
    if len(numbers) < 2:
        return [Estimate(value, math.nan) for value in values]
    left_out = np.array([measure(groups != number) for number in numbers], float)
    errors = left_out.std(axis=0) * math.sqrt(len(numbers) - 1)
    return [Estimate(float(value), float(error)) for value, error in zip(values, errors)]


def read_scores(metrics: Mapping[str, Any]) -> dict[Number, float | None]:
    """Find the scores in what `metrics.json` holds; None stands for those that there were too few images for."""
    numbers = [number for metric in METRICS.values() for number in metric.numbers]
    return {number: metrics[number.key] for number in numbers if number.key in metrics}


def score_table(scores: Mapping[str, Any], extractor: str) -> str:
    """Write scores for a person to read, a line each."""
    lines = [f"features: {'Inception' if extractor == 'inception' else 'Fashion-MNIST classifier, not Inception'}"]
    for number, value in read_scores(scores).items():
        line = f"{number.label:16s} " + ("too few images" if value is None else f"{value:.{number.digits}f}")
        error = scores.get("standard_errors", {}).get(number.key)
        lines.append(line if error is None else f"{line} (standard error {error:.4g})")
    return "\n".join(lines)


def add_metric_flags(parser: argparse.ArgumentParser, *, standard_errors: bool = True) -> None:
    """Add a flag for each metric that is not always computed and, if wanted, --standard_errors."""
    for name, metric in METRICS.items():
        if metric.help:
            parser.add_argument(f"--{name}", action="store_true", help=metric.help)
    if standard_errors:
        text = f"also estimate the standard errors, over {GROUPS} groups of images; takes {1 + GROUPS} times as long"
        parser.add_argument("--standard_errors", action="store_true", help=text)


def metrics_from_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the names of the metrics whose flags are given. Raises InputError if torch-fidelity is too old."""
    if getattr(args, "score", True):  # of eval.py
        import_torch_fidelity()
    return tuple(name for name, metric in METRICS.items() if metric.help and getattr(args, name))
