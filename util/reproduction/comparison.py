"""Two finished runs of the same seeds, compared image by image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from util.reproduction.results import Comparison, Evaluation, MethodScores
from util.runs.options import CheckedOptions
from util.runs.run import run_folder
from util.scoring.jackknife import Spread, groups_of_images, jackknife
from util.scoring.scores import FEATURES_DIMS, Statistics, score


def is_whole(options: CheckedOptions) -> bool:
    """True if an evaluation has come to its end and each of its files is still there."""
    return (options.output_dir / "metrics.json").exists() and not run_folder(options).unfinished()


def read_outputs(options: CheckedOptions, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, F] and logits [N, K] of a finished run's first `count` images."""
    run = run_folder(options)
    batches = [run.read(number) for number in run.batch_numbers()]
    features, logits = (
        torch.from_numpy(np.concatenate([getattr(batch, name) for batch in batches])[:count])
        for name in ("features", "logits")
    )
    return features, logits


def read_pixels(options: CheckedOptions, count: int) -> np.ndarray:
    """Pixels [N, H, W, 3] float32 of a finished run's first `count` images."""
    run = run_folder(options)
    return np.stack([run.read_image(index) for index in range(count)]).astype(np.float32)


class PairedScores(NamedTuple):
    """Scores of a run, and what they have to do with another run's of the same seeds; `mean` is that of other numbers.

    groups: the group [N] of each image that the standard errors are over.
    """

    fid: Spread
    inception_score: Spread
    fid_difference: Spread
    mean: Spread
    notes: list[str]
    groups: np.ndarray


def score_beside(options: CheckedOptions, other: CheckedOptions, count: int, numbers: np.ndarray) -> PairedScores:
    """Score the first `count` images of a run and those of another, each with its standard error.

    `numbers` [N] are one for each image, whose mean is wanted, too.
    """
    reference = Statistics.load(options.statistics, FEATURES_DIMS[options.preset.features])
    features, logits = read_outputs(options, count)
    other_features, other_logits = read_outputs(other, count)

    def measure(chosen: np.ndarray) -> list[float]:
        scores = score(features[chosen], logits[chosen], reference)
        other_scores = score(other_features[chosen], other_logits[chosen], reference)
        fid, other_fid, inception_score = (
            np.nan if number is None else number for number in (scores.fid, other_scores.fid, scores.is_mean)
        )
        return [fid, inception_score, fid - other_fid, numbers[chosen].mean()]

    groups = groups_of_images(options.labels()[:count])
    notes = list(score(features, logits, reference).notes)
    fid, inception_score, fid_difference, mean = jackknife(measure, groups)
    return PairedScores(fid, inception_score, fid_difference, mean, notes, groups)


def compare_with_baseline(
    options: CheckedOptions,
    baseline: CheckedOptions,
    count: int,
    evaluation: Evaluation,
    *,
    ablation: str | None,
    label: str,
) -> Comparison:
    """Score the first `count` images of a run and measure their distance to the baseline's, each with its error.

    `evaluation` is the run's own, of all its images.
    """
    distance = np.abs(read_pixels(options, count) - read_pixels(baseline, count)).mean(axis=(1, 2, 3))
    scores = score_beside(options, baseline, count, distance)
    return Comparison(
        ablation=ablation,
        label=label,
        num_images=count,
        sampling_seconds=evaluation.sampling_seconds,
        flops_per_image=evaluation.flops_per_image,
        fid=scores.fid,
        inception_score=scores.inception_score,
        fid_difference=scores.fid_difference,
        pixel_distance=scores.mean,
        pixel_distance_by_group=[float(distance[scores.groups == group].mean()) for group in np.unique(scores.groups)],
        notes=scores.notes,
    )


def score_method(options: CheckedOptions, lazymar: CheckedOptions) -> MethodScores:
    """Score all images of a run, beside LazyMAR's of the same seeds."""
    labels = np.array(options.labels())
    _, logits = read_outputs(options, len(labels))
    is_intended = logits.argmax(dim=1).numpy() == labels
    scores = score_beside(options, lazymar, len(labels), is_intended)
    return MethodScores(
        fid=scores.fid,
        inception_score=scores.inception_score,
        fid_difference=scores.fid_difference,
        share_intended=scores.mean,
        intended_by_class=[float(is_intended[labels == label].mean()) for label in np.unique(labels)],
        notes=scores.notes,
    )
